// One vector register of floats in the widest form that this translation unit is compiled for, and what the kernels do
// with it. Arithmetic and comparisons are the compiler's own vector extension; only loads, tails and reductions across
// lanes name instructions.
//
// Why not Google Highway, which has all of this: it is no Python package, so that `pip install .` would need a package of
// the system first, or its sources in this repository; and it dispatches between instruction sets by macros of its own,
// where one more compilation per set does here. Its speed has not been compared. To be reconsidered when an instruction
// set without fixed vectors (SVE, RVV) is wanted: the vector extension has none.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace cet::CET_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

static inline Vec splat(float x) { return x - Vec{}; }

// Of a NaN and a number, max and min are the second argument.
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

template <class To, class From>
static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

static inline Vec widen(HalfVec half, bfloat16) {
  return bit_cast<Vec>(__builtin_convertvector(half, UintVec) << 16);
}

static inline Vec widen(HalfVec half, float16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)half);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)half);
#else
  // The bits of a half are those of a float whose exponent is 112 too small; multiplying corrects subnormals too.
  const UintVec bits = __builtin_convertvector(half, UintVec);
  const UintVec magnitude = (bits & 0x7fff) << 13;
  const Vec scaled = bit_cast<Vec>(magnitude) * 0x1p112f;
  const UintVec special = (UintVec)(magnitude >= (0x7c00u << 13)) & (magnitude | 0x7f800000u);
  return bit_cast<Vec>((bit_cast<UintVec>(scaled) | special) | (bits & 0x8000) << 16);
#endif
}

template <class T>
static inline Vec load(const T* from) {
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  return widen(half, T{});
}

template <>
inline Vec load(const float* from) {
  Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}

// Two registers of elements, added up lane by lane in some order.
template <class T>
static inline Vec sum_of_two(const T* from) {
  return load(from) + load(from + kLanes);
}

template <>
inline Vec sum_of_two(const bfloat16* from) {
  UintVec pairs;  // each the upper half of a float
  std::memcpy(&pairs, from, sizeof pairs);
  return bit_cast<Vec>(pairs << 16) + bit_cast<Vec>(pairs & 0xffff0000u);
}

// The first n < kLanes elements, then `fill`; nothing behind them is read.
template <class T>
static inline Vec load_partial(const T* from, int64_t n, float fill = 0.0f) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto mask = (__mmask16)((1u << n) - 1);
  return (Vec)_mm512_mask_mov_ps(_mm512_set1_ps(fill), mask,
                                 (__m512)widen((HalfVec)_mm256_maskz_loadu_epi16(mask, from), T{}));
#else
  alignas(64) float lanes[kLanes];
  HalfVec half = {};
  std::memcpy(&half, from, n * sizeof(T));
  const Vec vec = widen(half, T{});
  std::memcpy(lanes, &vec, sizeof lanes);
  for (int64_t i = n; i < kLanes; ++i) lanes[i] = fill;
  return load(lanes);
#endif
}

template <>
inline Vec load_partial(const float* from, int64_t n, float fill) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), (__mmask16)((1u << n) - 1), from);
#else
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = fill;
  std::memcpy(lanes, from, n * sizeof(float));
  return load(lanes);
#endif
}

static inline float to_float(float x) { return x; }
static inline float to_float(bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
static inline float to_float(float16 x) {
  HalfVec half = {};
  half[0] = x.bits;
  return widen(half, float16{})[0];
}

// Rounded to nearest, ties to even; NaN stays NaN.
static inline HalfVec narrow(Vec x, bfloat16) {
  const UintVec bits = bit_cast<UintVec>(x);
  const UintVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : UintVec{} + 0x7fc0, HalfVec);
}

static inline HalfVec narrow(Vec x, float16) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (HalfVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const UintVec bits = bit_cast<UintVec>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // Subnormal: adding 0.5 makes the float's own rounding cut at 2^-24.
  const UintVec subnormal = bit_cast<UintVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const UintVec normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  UintVec half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? UintVec{} + 0x7c00 : half;  // rounds to 2^16 or more
  half = magnitude > 0x7f800000 ? UintVec{} + 0x7e00 : half;
  return __builtin_convertvector(sign | half, HalfVec);
#endif
}

template <class T>
static inline void store(T* to, Vec x) {
  const HalfVec half = narrow(x, T{});
  std::memcpy(to, &half, sizeof half);
}

template <>
inline void store(float* to, Vec x) {
  std::memcpy(to, &x, sizeof x);
}

// The first n < kLanes elements; nothing behind them is written.
template <class T>
static inline void store_partial(T* to, Vec x, int64_t n) {
  const HalfVec half = narrow(x, T{});
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(to, (__mmask16)((1u << n) - 1), (__m256i)half);
#else
  std::memcpy(to, &half, n * sizeof(T));
#endif
}

template <>
inline void store_partial(float* to, Vec x, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)x);
#else
  std::memcpy(to, &x, n * sizeof(float));
#endif
}

static inline void store(float* to, float x) { *to = x; }
template <class T>
static inline void store(T* to, float x) {
  const HalfVec half = narrow(splat(x), T{});
  std::memcpy(to, &half, sizeof(T));
}

static inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// Lane i of a for even i / S, of b for odd; the lanes S apart change places with Flip.
template <int S, bool Flip, int... I>
static inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & S ? kLanes : 0) + (Flip ? I ^ S : I))...);
}

// Lane i is the sum over the lanes of v[i]: pairs, then pairs of pairs, each step halving the registers.
template <int S = 1>
static inline Vec sum_each(const Vec (&v)[kLanes / S]) {
  if constexpr (S == kLanes) {
    return v[0];
  } else {
    const auto lanes = std::make_integer_sequence<int, kLanes>();
    Vec sums[kLanes / S / 2];
    for (int i = 0; i < kLanes / S / 2; ++i) {
      const Vec a = v[2 * i], b = v[2 * i + 1];
      sums[i] = interleave<S, false>(a, b, lanes) + interleave<S, true>(a, b, lanes);
    }
    return sum_each<S * 2>(sums);
  }
}

static inline float max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

constexpr float kExpUnderflow = -87.3f;  // below, exp is taken as 0; the true value is under 1.2e-38

// exp of x <= 0, within 1 ulp; 0 below kExpUnderflow, NaN of NaN.
static inline Vec exp(Vec x) {
  const Vec magic = splat(0x1.8p23f);  // adding it leaves an integer in the low bits of the mantissa
  const Vec clamped = x < kExpUnderflow ? splat(kExpUnderflow) : x;
  const Vec shifted = clamped * 0x1.715476p0f + magic;
  const Vec n = shifted - magic;
  const Vec r = clamped - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  // The minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2] (Cephes, expf).
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec power = bit_cast<Vec>((bit_cast<UintVec>(shifted) + 127) << 23);
  return x < kExpUnderflow ? Vec{} : p * power;
}

// The natural logarithm of a normal number > 0, within 1 ulp; some number around -88 of 0 and of subnormals, NaN of NaN.
static inline Vec log(Vec x) {
  constexpr uint32_t kRootOfHalf = 0x3f3504f3;
  const UintVec offset = bit_cast<UintVec>(x) - kRootOfHalf;
  const Vec e = __builtin_convertvector((IntVec)offset >> 23, Vec);
  const Vec m = bit_cast<Vec>((offset & 0x7fffff) + kRootOfHalf) - 1.0f;  // x = (1 + m) 2^e, 1 + m in [sqrt(1/2), sqrt(2))
  // The minimax polynomial of log(1 + m) (Cephes, logf).
  Vec p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const Vec square = m * m;
  const Vec low = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  return x == x ? low + m + e * 0.693359375f : x;
}

}  // namespace cet::CET_CAPABILITY
