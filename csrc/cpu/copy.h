// Moving rows.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include "vec.h"

namespace cet::CET_CAPABILITY {

constexpr int64_t kLine = 64;

// Whether so much output is written past the caches. What fits is left there: the next stage reads it.
static inline bool exceeds_cache(int64_t bytes) {
  static const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > (cache > 0 ? cache : long{32} << 20) / 2;
}

// Past the caches: the lines of the destination are not read before they are written.
static inline void stream(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (bytes < head + kLine) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
    for (int j = 0; j < kLine; j += 32) {
      const auto* source = reinterpret_cast<const __m256i*>(from + i + j);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + j), _mm256_loadu_si256(source));
    }
#else
    for (int j = 0; j < kLine; j += 16) {
      const auto* source = reinterpret_cast<const __m128i*>(from + i + j);
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i + j), _mm_loadu_si128(source));
    }
#endif
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Streaming stores are not ordered with the stores by which another thread learns that the rows are there.
static inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Fresh memory is mapped when it is first written. In pages of 4 KiB that takes ten times as long as the copy itself
// (measured, 64 MiB in a virtual machine), in huge pages less than the copy. Smaller memory is mostly not fresh, as glibc
// keeps what is freed, and the system call then costs more than it saves. Advice that is not taken does no harm.
static inline void advise_huge_pages(char* to, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < 32 << 20) return;
  constexpr intptr_t kHugePage = 2 << 20;
  const intptr_t begin = (reinterpret_cast<intptr_t>(to) + kHugePage - 1) & -kHugePage;
  const intptr_t end = (reinterpret_cast<intptr_t>(to) + bytes) & -kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#endif
}

}  // namespace cet::CET_CAPABILITY
