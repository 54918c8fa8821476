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

typedef double VecD __attribute__((vector_size(kBytes)));
typedef float VecF __attribute__((vector_size(kBytes)));
typedef float HalfF __attribute__((vector_size(kBytes / 2)));  // as many floats as VecD has doubles
typedef uint32_t HalfU __attribute__((vector_size(kBytes / 2)));
typedef uint16_t HalfH __attribute__((vector_size(kBytes / 2)));  // as many 16-bit values as VecF has floats
typedef uint32_t VecU __attribute__((vector_size(kBytes)));
typedef uint16_t QuarterH __attribute__((vector_size(kBytes / 4)));  // as many 16-bit values as VecD has doubles

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

inline float to_float(Bfloat16 x) { return bits<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);  // inf, NaN
  // subnormals too: as an integer the magnitude is a float scaled by 2^112, exactly
  return bits<float>(sign | bits<uint32_t>(bits<float>(magnitude << 13) * 0x1p112f));
}

inline Bfloat16 to_bfloat16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>(u >> 16 | 0x40u)};  // stays NaN
  return {static_cast<uint16_t>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};                  // nearest, ties to even
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
  for (int lane = 0; lane < kDoubles; ++lane) v[lane] = to_float(p[lane]);
  return v;
#endif
}

inline VecF load_floats(const float* p) { return load<VecF>(p); }
inline VecF load_floats(const Bfloat16* p) {
#if defined(__AVX512F__)
  return bits<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits<__m256i>(load<HalfH>(p))), 16));
#elif defined(__AVX2__)
  return bits<VecF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits<__m128i>(load<HalfH>(p))), 16));
#else
  return bits<VecF>(__builtin_convertvector(load<HalfH>(p), VecU) << 16);
#endif
}
inline VecF load_floats(const Float16* p) {
#if defined(__AVX512F__)
  return bits<VecF>(_mm512_cvtph_ps(bits<__m256i>(load<HalfH>(p))));
#elif defined(__AVX2__)
  return bits<VecF>(_mm256_cvtph_ps(bits<__m128i>(load<HalfH>(p))));
#else
  VecF v;
  for (int lane = 0; lane < kFloats; ++lane) v[lane] = to_float(p[lane]);
  return v;
#endif
}

// ---- sums over lanes

// Lane l becomes the sum of the lanes of v[l], for as many vectors as a vector has lanes.
inline VecD sum_each(const VecD* v) {
#if defined(__AVX512F__)
  VecD pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const VecD a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const VecD a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
#elif defined(__AVX2__)
  VecD pairs[2];
  for (int i = 0; i < 2; ++i) {
    const VecD a = v[2 * i], b = v[2 * i + 1];
    pairs[i] = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
  }
  return __builtin_shufflevector(pairs[0], pairs[1], 0, 1, 4, 5) +
         __builtin_shufflevector(pairs[0], pairs[1], 2, 3, 6, 7);
#else
  return __builtin_shufflevector(v[0], v[1], 0, 2) + __builtin_shufflevector(v[0], v[1], 1, 3);
#endif
}

inline VecD fold_lanes(VecD v) { return v; }
inline VecD fold_lanes(VecF v) {
#if defined(__AVX512F__)
  const __m512 all = bits<__m512>(v);
  const __m256 low = _mm512_castps512_ps256(all), high = _mm512_extractf32x8_ps(all, 1);
#elif defined(__AVX2__)
  const __m256 all = bits<__m256>(v);
  const __m128 low = _mm256_castps256_ps128(all), high = _mm256_extractf128_ps(all, 1);
#else
  const HalfF low = __builtin_shufflevector(v, v, 0, 1), high = __builtin_shufflevector(v, v, 2, 3);
#endif
  return widen(bits<HalfF>(low)) + widen(bits<HalfF>(high));
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
