// Vectors of one instruction set, by the compiler's vector types; included once in each variant's file.
// Everything sits in the variant's own namespace, and no header with inline functions is used beside intrinsics: code
// compiled for one instruction set must not be what the linker keeps for another.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gradvac::cpu::GRADVAC_VARIANT {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kBlock = 4;  // 4 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kBytes = 32, kBlock = 3;  // 3 x 3 of 16
#else
constexpr int kBytes = 16, kBlock = 3;
#endif
constexpr int kDoubles = kBytes / 8, kFloats = kBytes / 4;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef double VecD __attribute__((vector_size(kBytes)));
typedef float VecF __attribute__((vector_size(kBytes)));
typedef float HalfF __attribute__((vector_size(kBytes / 2)));  // as many floats as VecD has doubles
typedef uint32_t HalfU __attribute__((vector_size(kBytes / 2)));
typedef uint16_t HalfH __attribute__((vector_size(kBytes / 2)));  // as many 16-bit values as VecF has floats
typedef uint32_t VecU __attribute__((vector_size(kBytes)));
typedef uint16_t QuarterH __attribute__((vector_size(kBytes / 4)));  // as many 16-bit values as VecD has doubles

// Asks for a cache line that is read soon. Into the second level AMD's cores get more of them at a time than into the
// first, Intel's fewer; only AMD's choose the variant with bfloat16 products.
#if defined(__AVX512BF16__)
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
#else
inline void prefetch(const void* p) { __builtin_prefetch(p); }
#endif

template <class V>
inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// ---- scalar conversions, where the instruction set has none

inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);  // inf, NaN
  // subnormals too: as an integer the magnitude is a float scaled by 2^112, exactly
  return bits<float>(sign | bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f));
}

inline Float16 to_float16(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    return {static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3F000000u))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13)};
}

// ---- vectors of doubles and of floats from gradients of any type (GCC 12 splits these conversions: intrinsics)

inline VecD widen(HalfF v) {
#if defined(__AVX512F__)
  return bits<VecD>(_mm512_cvtps_pd(bits<__m256>(v)));
#elif defined(__AVX2__)
  return bits<VecD>(_mm256_cvtps_pd(bits<__m128>(v)));
#else
  return __builtin_convertvector(v, VecD);
#endif
}

inline VecD load_doubles(const double* p) { return load<VecD>(p); }
inline VecD load_doubles(const float* p) { return widen(load<HalfF>(p)); }
inline VecD load_doubles(const Bfloat16* p) {
#if defined(__AVX512F__)
  return widen(bits<HalfF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits<__m128i>(load<QuarterH>(p))), 16)));
#elif defined(__AVX2__)
  return widen(
      bits<HalfF>(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16)));
#else
  return widen(bits<HalfF>(__builtin_convertvector(load<QuarterH>(p), HalfU) << 16));
#endif
}
inline VecD load_doubles(const Float16* p) {
#if defined(__AVX512F__)
  return widen(bits<HalfF>(_mm256_cvtph_ps(bits<__m128i>(load<QuarterH>(p)))));
#elif defined(__AVX2__)
  return widen(bits<HalfF>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  VecD v;
  for (int lane = 0; lane < kDoubles; ++lane) v[lane] = to_float(load<Float16>(p + lane));
  return v;
#endif
}

inline VecF load_floats(const float* p) { return load<VecF>(p); }
// Of as many pairs: one of each, and the other.
inline VecF load_even_floats(const Bfloat16* p) { return bits<VecF>(load<VecU>(p) << 16); }
inline VecF load_odd_floats(const Bfloat16* p) { return bits<VecF>(load<VecU>(p) & 0xFFFF0000u); }

inline VecF load_floats(const Float16* p) {
#if defined(__AVX512F__)
  return bits<VecF>(_mm512_cvtph_ps(bits<__m256i>(load<HalfH>(p))));
#elif defined(__AVX2__)
  return bits<VecF>(_mm256_cvtph_ps(bits<__m128i>(load<HalfH>(p))));
#else
  VecF v;
  for (int lane = 0; lane < kFloats; ++lane) v[lane] = to_float(load<Float16>(p + lane));
  return v;
#endif
}

// GCC has __builtin_shufflevector from 12 on only.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
typedef int64_t OrderD __attribute__((vector_size(kBytes)));
typedef int32_t OrderF __attribute__((vector_size(kBytes)));
#define GRADVAC_SHUFFLE_D(a, b, ...) __builtin_shuffle(a, b, (OrderD){__VA_ARGS__})
#define GRADVAC_SHUFFLE_F(a, b, ...) __builtin_shuffle(a, b, (OrderF){__VA_ARGS__})
#else
#define GRADVAC_SHUFFLE_D(...) __builtin_shufflevector(__VA_ARGS__)
#define GRADVAC_SHUFFLE_F(...) __builtin_shufflevector(__VA_ARGS__)
#endif

// Two vectors of consecutive gradients, in an order that their type is fast in.
struct Doubles {
  VecD v[2];
};
template <class E>
inline Doubles load_two(const E* p) {
  return {{load_doubles(p), load_doubles(p + kDoubles)}};
}
#if defined(__AVX512BF16__)
// AMD's cores widen floats out of memory twice as fast to vectors of half the size.
typedef double HalfD __attribute__((vector_size(kBytes / 2)));
struct HalfDoubles {
  HalfD v[4];
};
inline HalfDoubles load_two(const float* p) {
  const auto widened = [p](int i) { return bits<HalfD>(_mm256_cvtps_pd(_mm_loadu_ps(p + i * kDoubles / 2))); };
  return {{widened(0), widened(1), widened(2), widened(3)}};
}
#endif
inline Doubles load_two(const Bfloat16* p) {  // the even ones and the odd ones: half a word each
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even one is the low half");
  const HalfU pairs = load<HalfU>(p);
  return {{widen(bits<HalfF>(pairs << 16)), widen(bits<HalfF>(pairs & 0xFFFF0000u))}};
}

// The same in their own order.
template <class E>
inline Doubles in_order(Doubles two) {
  return two;
}
#if defined(__AVX512BF16__)
template <class E>
inline Doubles in_order(HalfDoubles two) {
  const auto joined = [&two](int i) {
    return bits<VecD>(
        _mm512_insertf64x4(_mm512_castpd256_pd512(bits<__m256d>(two.v[i])), bits<__m256d>(two.v[i + 1]), 1));
  };
  return {{joined(0), joined(2)}};
}
#endif
template <>
inline Doubles in_order<Bfloat16>(Doubles two) {
  const VecD even = two.v[0], odd = two.v[1];
#if defined(__AVX512F__)
  return {{GRADVAC_SHUFFLE_D(even, odd, 0, 8, 1, 9, 2, 10, 3, 11),
           GRADVAC_SHUFFLE_D(even, odd, 4, 12, 5, 13, 6, 14, 7, 15)}};
#elif defined(__AVX2__)
  return {{GRADVAC_SHUFFLE_D(even, odd, 0, 4, 1, 5), GRADVAC_SHUFFLE_D(even, odd, 2, 6, 3, 7)}};
#else
  return {{GRADVAC_SHUFFLE_D(even, odd, 0, 2), GRADVAC_SHUFFLE_D(even, odd, 1, 3)}};
#endif
}

// ---- and back, two vectors at a time, rounded to nearest, ties to even

inline HalfF narrow(VecD v) {
#if defined(__AVX512F__)
  return bits<HalfF>(_mm512_cvtpd_ps(bits<__m512d>(v)));
#elif defined(__AVX2__)
  return bits<HalfF>(_mm256_cvtpd_ps(bits<__m256d>(v)));
#else
  return __builtin_convertvector(v, HalfF);
#endif
}
inline VecF narrow(VecD a, VecD b) {
  const HalfF low = narrow(a), high = narrow(b);
#if defined(__AVX512F__)
  return bits<VecF>(_mm512_insertf32x8(_mm512_castps256_ps512(bits<__m256>(low)), bits<__m256>(high), 1));
#elif defined(__AVX2__)
  return bits<VecF>(_mm256_set_m128(bits<__m128>(high), bits<__m128>(low)));
#else
  return VecF{low[0], low[1], high[0], high[1]};
#endif
}

inline void store_rounded(double* p, VecD a, VecD b) {
  store(p, a);
  store(p + kDoubles, b);
}
inline void store_rounded(float* p, VecD a, VecD b) {
  store(p, narrow(a));
  store(p + kDoubles, narrow(b));
}
// bfloat16 in the upper halves of the words; NaN stays NaN.
inline VecU round_to_bfloat16(VecF floats) {
  const VecU u = bits<VecU>(floats), quiet = u | 0x400000u, nearest = u + 0x7FFFu + (u >> 16 & 1u);
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask(bits<__m512>(floats), bits<__m512>(floats), _CMP_UNORD_Q);
  return bits<VecU>(_mm512_mask_mov_epi32(bits<__m512i>(nearest), nan, bits<__m512i>(quiet)));
#else
  const VecU nan = bits<VecU>((u & 0x7FFFFFFFu) > 0x7F800000u);
  return (nan & quiet) | (~nan & nearest);
#endif
}
inline void store_rounded(Bfloat16* p, VecD a, VecD b) {
  const VecU high = round_to_bfloat16(narrow(a, b)) >> 16;
#if defined(__AVX512F__)
  store(p, _mm512_cvtepi32_epi16(bits<__m512i>(high)));
#elif defined(__AVX2__)
  const __m256i all = bits<__m256i>(high);
  store(p, _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  store(p, __builtin_convertvector(high, HalfH));
#endif
}
// Twice two vectors in the order that bfloat16 is fast in: the even ones and the odd ones are halves of words again.
inline void store_rounded(Bfloat16* p, Doubles one, Doubles other) {
  const VecU even = round_to_bfloat16(narrow(one.v[0], other.v[0]));
  const VecU odd = round_to_bfloat16(narrow(one.v[1], other.v[1]));
  store(p, (odd & 0xFFFF0000u) | even >> 16);
}
inline void store_rounded(Float16* p, VecD a, VecD b) {
  const VecF floats = narrow(a, b);
#if defined(__AVX512F__)
  store(p, _mm512_cvtps_ph(bits<__m512>(floats), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  store(p, _mm256_cvtps_ph(bits<__m256>(floats), _MM_FROUND_TO_NEAREST_INT));
#else
  Float16 rounded[kFloats];
  for (int lane = 0; lane < kFloats; ++lane) rounded[lane] = to_float16(floats[lane]);
  store(p, load<HalfH>(rounded));
#endif
}

// ---- sums over lanes

#if defined(__AVX512F__)
#define GRADVAC_SHUFFLE_PAIRS_LOW 0, 8, 2, 10, 4, 12, 6, 14
#define GRADVAC_SHUFFLE_PAIRS_HIGH 1, 9, 3, 11, 5, 13, 7, 15
#define GRADVAC_SHUFFLE_FLOATS_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define GRADVAC_SHUFFLE_FLOATS_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#elif defined(__AVX2__)
#define GRADVAC_SHUFFLE_PAIRS_LOW 0, 4, 2, 6
#define GRADVAC_SHUFFLE_PAIRS_HIGH 1, 5, 3, 7
#define GRADVAC_SHUFFLE_FLOATS_LOW 0, 8, 1, 9, 4, 12, 5, 13
#define GRADVAC_SHUFFLE_FLOATS_HIGH 2, 10, 3, 11, 6, 14, 7, 15
#else
#define GRADVAC_SHUFFLE_PAIRS_LOW 0, 2
#define GRADVAC_SHUFFLE_PAIRS_HIGH 1, 3
#define GRADVAC_SHUFFLE_FLOATS_LOW 0, 4, 1, 5
#define GRADVAC_SHUFFLE_FLOATS_HIGH 2, 6, 3, 7
#endif

inline VecD low_pairs(VecD a, VecD b) { return GRADVAC_SHUFFLE_D(a, b, GRADVAC_SHUFFLE_PAIRS_LOW); }
inline VecD high_pairs(VecD a, VecD b) { return GRADVAC_SHUFFLE_D(a, b, GRADVAC_SHUFFLE_PAIRS_HIGH); }

// In every 128 bits: the sum of a's two doubles, and of b's.
inline VecD sum_pairs(VecD a, VecD b) { return low_pairs(a, b) + high_pairs(a, b); }

// In every 128 bits: the sums of the four floats of a, of b, of c and of d.
inline VecF sum_fours(VecF a, VecF b, VecF c, VecF d) {
  const VecF ab =
      GRADVAC_SHUFFLE_F(a, b, GRADVAC_SHUFFLE_FLOATS_LOW) + GRADVAC_SHUFFLE_F(a, b, GRADVAC_SHUFFLE_FLOATS_HIGH);
  const VecF cd =
      GRADVAC_SHUFFLE_F(c, d, GRADVAC_SHUFFLE_FLOATS_LOW) + GRADVAC_SHUFFLE_F(c, d, GRADVAC_SHUFFLE_FLOATS_HIGH);
  return bits<VecF>(low_pairs(bits<VecD>(ab), bits<VecD>(cd))) + bits<VecF>(high_pairs(bits<VecD>(ab), bits<VecD>(cd)));
}

// sums[i] += the sum of the lanes of v[i], for four vectors.
inline void add_sums_of_four(const VecD* v, double* sums) {
  const VecD ab = sum_pairs(v[0], v[1]), cd = sum_pairs(v[2], v[3]);
#if defined(__AVX512F__)
  // ab: [a, b] in each of four 128 bits
  const VecD low = GRADVAC_SHUFFLE_D(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13);
  const VecD high = GRADVAC_SHUFFLE_D(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  const VecD four = low + high;  // [a, b, c, d] twice
  _mm256_storeu_pd(sums, _mm256_loadu_pd(sums) + (_mm512_castpd512_pd256(bits<__m512d>(four)) +
                                                  _mm512_extractf64x4_pd(bits<__m512d>(four), 1)));
#elif defined(__AVX2__)
  const VecD four = GRADVAC_SHUFFLE_D(ab, cd, 0, 1, 4, 5) + GRADVAC_SHUFFLE_D(ab, cd, 2, 3, 6, 7);
  store(sums, load<VecD>(sums) + four);
#else
  store(sums, load<VecD>(sums) + ab);
  store(sums + 2, load<VecD>(sums + 2) + cd);
#endif
}

inline void add_sums_of_four(const VecF* v, double* sums) {
  const VecF fours = sum_fours(v[0], v[1], v[2], v[3]);
#if defined(__AVX512F__)
  const __m512 all = bits<__m512>(fours);  // the four sums over each 128 bits; those over 256 bits apart come first
  const __m256 halves = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  _mm256_storeu_pd(
      sums, _mm256_loadu_pd(sums) + _mm256_cvtps_pd(_mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1)));
#elif defined(__AVX2__)
  const __m256 all = bits<__m256>(fours);
  store(sums, load<VecD>(sums) + (widen(bits<HalfF>(_mm256_castps256_ps128(all))) +
                                  widen(bits<HalfF>(_mm256_extractf128_ps(all, 1)))));
#else
  HalfF halves[2];
  __builtin_memcpy(halves, &fours, sizeof(fours));
  store(sums, load<VecD>(sums) + widen(halves[0]));
  store(sums + 2, load<VecD>(sums + 2) + widen(halves[1]));
#endif
}

#if defined(__AVX512F__)
// Of a and of b: the sums of what lies 256 bits apart.
inline VecF sum_halves(VecF a, VecF b) {
  const VecD x = bits<VecD>(a), y = bits<VecD>(b);
  return bits<VecF>(GRADVAC_SHUFFLE_D(x, y, 0, 1, 2, 3, 8, 9, 10, 11)) +
         bits<VecF>(GRADVAC_SHUFFLE_D(x, y, 4, 5, 6, 7, 12, 13, 14, 15));
}

// The same for sixteen vectors, by the same additions, with fewer shuffles.
inline void add_sums_of_sixteen(const VecF* v, double* sums) {
  const VecF a = sum_fours(v[0], v[1], v[2], v[3]), b = sum_fours(v[4], v[5], v[6], v[7]);
  const VecF c = sum_fours(v[8], v[9], v[10], v[11]), d = sum_fours(v[12], v[13], v[14], v[15]);
  const VecD ab = bits<VecD>(sum_halves(a, b)), cd = bits<VecD>(sum_halves(c, d));  // [a, a, b, b], [c, c, d, d]
  const __m512 all = bits<__m512>(bits<VecF>(GRADVAC_SHUFFLE_D(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13)) +
                                  bits<VecF>(GRADVAC_SHUFFLE_D(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15)));
  store(sums, load<VecD>(sums) + widen(bits<HalfF>(_mm512_castps512_ps256(all))));
  store(sums + kDoubles, load<VecD>(sums + kDoubles) + widen(bits<HalfF>(_mm512_extractf32x8_ps(all, 1))));
}
#endif

}  // namespace gradvac::cpu::GRADVAC_VARIANT
