// Combine: the weighted sum of the rows over a run of columns, in float64.
#pragma once

#include "gradvac/cpu.h"
#include "simd.h"

namespace gradvac::cpu::GRADVAC_VARIANT {

constexpr int64_t kCombineTile = 512;   // columns: the sums and the rounded result stay in the first-level cache
constexpr int64_t kCombineAhead = 768;  // bytes: nearer, memory would not answer in time; farther, rows would not fit

// sums[c] (+)= sum_r weights[r] row_r[c] for R rows
template <int R, bool kFirst, class E>
inline void add_rows(const E* rows, int64_t stride, const double* weights, int64_t columns, double* sums) {
  // A cache line of every row at a time, or what of it the registers hold.
  constexpr int kLine = 64 / kDoubles / static_cast<int>(sizeof(E)), kVectors = kLine < 4 ? kLine : 4;
  int64_t column = 0;
  for (; column + kVectors * kDoubles <= columns; column += kVectors * kDoubles) {
    VecD sum[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = kFirst ? VecD{} : load<VecD>(sums + column + v * kDoubles);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const E* row = rows + r * stride + column;
      prefetch(reinterpret_cast<const char*>(row) + kCombineAhead);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += load_doubles(row + v * kDoubles) * weights[r];
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + column + v * kDoubles, sum[v]);
  }
  for (; column + kDoubles <= columns; column += kDoubles) {
    VecD sum = kFirst ? VecD{} : load<VecD>(sums + column);
    for (int r = 0; r < R; ++r) sum += load_doubles(rows + r * stride + column) * weights[r];
    store(sums + column, sum);
  }
  if (column < columns) {
    VecD sum = kFirst ? VecD{} : load<VecD>(sums + column);
    for (int r = 0; r < R; ++r) {
      E padded[kDoubles] = {};
      __builtin_memcpy(padded, rows + r * stride + column, (columns - column) * sizeof(E));
      sum += load_doubles(padded) * weights[r];
    }
    store(sums + column, sum);
  }
}

template <int R, bool kFirst, class E>
inline void add_rows_of(int64_t rows_left, const E* rows, int64_t stride, const double* weights, int64_t columns,
                        double* sums) {
  if (rows_left >= R) return add_rows<R, kFirst>(rows, stride, weights, columns, sums);
  if constexpr (R > 1) add_rows_of<R - 1, kFirst>(rows_left, rows, stride, weights, columns, sums);
}

inline void round_to(const double* sums, int64_t columns, float* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<float>(sums[c]);
}
inline void round_to(const double* sums, int64_t columns, Bfloat16* out) {
  for (int64_t c = 0; c < columns; ++c) out[c] = to_bfloat16(static_cast<float>(sums[c]));
}
inline void round_to(const double* sums, int64_t columns, Float16* out) {
#if defined(__AVX512F__)  // whole vectors: there is room in a tile
  for (int64_t c = 0; c < columns; c += kDoubles) {
    store(out + c, _mm256_cvtps_ph(_mm512_cvtpd_ps(_mm512_loadu_pd(sums + c)), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__AVX2__)
  for (int64_t c = 0; c < columns; c += kDoubles) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + c),
                     _mm_cvtps_ph(_mm256_cvtpd_ps(_mm256_loadu_pd(sums + c)), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int64_t c = 0; c < columns; ++c) out[c] = to_float16(static_cast<float>(sums[c]));
#endif
}

// Streaming stores spare the read of lines that are wholly overwritten, and leave the cache to the gradients.
inline void copy_out(char* to, const char* from, int64_t bytes, bool stream) {
#if defined(__AVX2__)
  if (stream) {
    int64_t head = -reinterpret_cast<intptr_t>(to) & (kBytes - 1);
    if (head > bytes) head = bytes;
    __builtin_memcpy(to, from, head);
    int64_t done = head;
    for (; done + kBytes <= bytes; done += kBytes) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_loadu_si512(from + done));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + done),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + done)));
#endif
    }
    __builtin_memcpy(to + done, from + done, bytes - done);
    return;
  }
#endif
  (void)stream;
  __builtin_memcpy(to, from, bytes);
}

template <class Out>
inline void write(const double* sums, int64_t columns, void* out, int64_t begin, bool stream) {
  Out rounded[kCombineTile];
  round_to(sums, columns, rounded);
  copy_out(reinterpret_cast<char*>(static_cast<Out*>(out) + begin), reinterpret_cast<const char*>(rounded),
           columns * sizeof(Out), stream);
}
template <>
inline void write<double>(const double* sums, int64_t columns, void* out, int64_t begin, bool stream) {
  copy_out(reinterpret_cast<char*>(static_cast<double*>(out) + begin), reinterpret_cast<const char*>(sums),
           columns * sizeof(double), stream);
}

template <class E>
void combine(const void* data, int64_t T, int64_t row_stride, int64_t begin, int64_t end, const double* weights,
             void* out, Dtype out_dtype, bool stream) {
  alignas(kBytes) double sums[kCombineTile];
  for (int64_t column = begin; column < end; column += kCombineTile) {
    const int64_t columns = end - column < kCombineTile ? end - column : kCombineTile;
    const E* rows = static_cast<const E*>(data) + column;
    add_rows_of<8, true>(T, rows, row_stride, weights, columns, sums);
    for (int64_t row = 8; row < T; row += 8) {
      add_rows_of<8, false>(T - row, rows + row * row_stride, row_stride, weights + row, columns, sums);
    }
    switch (out_dtype) {
      case Dtype::float32: write<float>(sums, columns, out, column, stream); break;
      case Dtype::bfloat16: write<Bfloat16>(sums, columns, out, column, stream); break;
      case Dtype::float16: write<Float16>(sums, columns, out, column, stream); break;
      case Dtype::float64: write<double>(sums, columns, out, column, stream); break;
    }
  }
#if defined(__AVX2__)
  if (stream) _mm_sfence();
#endif
}

}  // namespace gradvac::cpu::GRADVAC_VARIANT
