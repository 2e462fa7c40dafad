// The scans and the convolution of scan_cpu.py, compiled. The equations are in scan_torch.py, what
// each function means is in reference.py. A plain C interface, no library but OpenMP's at most.
//
// A vector holds one step of W channels; the loop over N states is innermost, with the states in
// registers. A task is a sample and a tile of channels: it brings the tile into the first caches as
// fp32, whatever its strides and type, and scans it. Tasks share nothing, and sums over tasks are
// taken in a fixed order afterwards, so results depend neither on timing nor on the thread count.
//
// The backward writes the decays and states of as many steps as KEPT_BYTES hold into memory of the
// second cache and reads them backwards. Of a longer sequence it first computes the states before
// each such piece.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int TILE = 64;                   // channels of a tile: whole cache lines of any input
constexpr int TILE_STEPS = 64;             // steps of a forward tile
constexpr int64_t KEPT_BYTES = 512 << 10;  // decays and states kept by a thread's backward
constexpr int MOST_STATES = 256;
constexpr uint8_t RESET = 1, SKIP = 2;  // of kernels/reference.py
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V splat(float x) { return x - V{}; }
inline V select(VI mask, V yes, V no) { return (V)((mask & (VI)yes) | (~mask & (VI)no)); }

// 2^x, relative error 1.5e-7, exact at 0; 0, infinity and NaN where they are due.
inline V exp2(V x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  V f = (V)_mm512_reduce_ps((__m512)x, 0);  // x - round(x); 0 for infinities
  V n = x - f;
#else
  x = select(x < -127.0f, splat(-127.0f), x);
  x = select(x > 128.0f, splat(128.0f), x);
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no place for a fraction
  V n = (x + round) - round;
  V f = x - n;
#endif
  V p = f * 1.3264727e-3f + 9.6715126e-3f;
  p = p * f + 5.5507337e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (V)((__builtin_convertvector(n, VI) + 127) << 23);  // 0 and infinity at the ends
#endif
}

inline V magnitude(V x) { return (V)((VI)x & 0x7fffffff); }

// log(1 + e^x) and its derivative; relative error below 1e-6 for x in [-20, 20].
inline V softplus(V x) {
  V e = exp2(magnitude(x) * -LOG2_E);
  V s = e / (e + 2.0f), q = s * s;  // log(1 + e) = 2 artanh(s)
  V p = q * 1.4005993e-1f + 1.4000903e-1f;
  p = p * q + 2.0010764e-1f;
  p = p * q + 3.3333208e-1f;
  V log = (s + s) + (s + s) * q * p;
  return select(x > 0.0f, x, V{}) + log;
}
inline V sigmoid(V x) {
  V e = exp2(magnitude(x) * -LOG2_E);
  return select(x < 0.0f, e, splat(1.0f)) / (e + 1.0f);
}
inline V silu(V x) { return x * sigmoid(x); }
inline V dsilu(V x) {
  V s = sigmoid(x);
  return s + x * s * (1.0f - s);
}

// The sums of W vectors: lane i of the result is the sum of the lanes of v[i], which is
// overwritten.
#if defined(__clang__) || __GNUC__ >= 12
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define EMRRG_PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
inline V sums(V* v) {
  for (int i = 0; i < 8; ++i) {
    V a = v[2 * i], b = v[2 * i + 1];
    v[i] = EMRRG_PAIR(a, b, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
           EMRRG_PAIR(a, b, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  }
  for (int i = 0; i < 4; ++i) {
    V a = v[2 * i], b = v[2 * i + 1];
    v[i] = EMRRG_PAIR(a, b, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
           EMRRG_PAIR(a, b, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
  }
  for (int i = 0; i < 2; ++i) {
    V a = v[2 * i], b = v[2 * i + 1];
    v[i] = EMRRG_PAIR(a, b, 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +
           EMRRG_PAIR(a, b, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  }
  V a = v[0], b = v[1];
  return EMRRG_PAIR(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +
         EMRRG_PAIR(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
}
#elif defined(__AVX__)
#define EMRRG_PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
inline V sums(V* v) {
  for (int i = 0; i < 4; ++i) {
    V a = v[2 * i], b = v[2 * i + 1];
    v[i] =
        EMRRG_PAIR(a, b, 0, 9, 2, 11, 4, 13, 6, 15) + EMRRG_PAIR(a, b, 1, 8, 3, 10, 5, 12, 7, 14);
  }
  for (int i = 0; i < 2; ++i) {
    V a = v[2 * i], b = v[2 * i + 1];
    v[i] =
        EMRRG_PAIR(a, b, 0, 1, 10, 11, 4, 5, 14, 15) + EMRRG_PAIR(a, b, 2, 3, 8, 9, 6, 7, 12, 13);
  }
  V a = v[0], b = v[1];
  return EMRRG_PAIR(a, b, 0, 1, 2, 3, 12, 13, 14, 15) + EMRRG_PAIR(a, b, 4, 5, 6, 7, 8, 9, 10, 11);
}
#else
#define EMRRG_PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
inline V sums(V* v) {
  for (int i = 0; i < 2; ++i) {
    V a = v[2 * i], b = v[2 * i + 1];
    v[i] = EMRRG_PAIR(a, b, 0, 5, 2, 7) + EMRRG_PAIR(a, b, 1, 4, 3, 6);
  }
  V a = v[0], b = v[1];
  return EMRRG_PAIR(a, b, 0, 1, 6, 7) + EMRRG_PAIR(a, b, 2, 3, 4, 5);
}
#endif
#else
inline V sums(V* v) {
  V result{};
  for (int i = 0; i < W; ++i) {
    float sum = 0;
    for (int j = 0; j < W; ++j) sum += v[i][j];
    result[i] = sum;
  }
  return result;
}
#endif

// Tensors of any strides and three types.

enum Type : int64_t { FP32 = 1, BF16 = 2, FP16 = 3 };

struct Tensor {
  char* data;  // null: absent
  int64_t type;
  int64_t stride[4];  // in elements: order or group, sample, step or token, channel or state
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(const float* p) { return *p; }

struct Bf16 {
  uint16_t bits;
};
inline float widen(const Bf16* p) { return bits_to_float(uint32_t(p->bits) << 16); }
inline void narrow(float x, Bf16* p) {
  uint32_t b = float_to_bits(x);
  uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;  // to nearest, ties to even
  p->bits = uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
inline void narrow(float x, float* p) { *p = x; }

struct Fp16 {
  uint16_t bits;
};
#if defined(__F16C__)
inline float widen(const Fp16* p) { return _cvtsh_ss(p->bits); }
inline void narrow(float x, Fp16* p) { p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
inline float widen(const Fp16* p) {
  uint32_t b = p->bits, sign = (b & 0x8000) << 16, rest = b & 0x7fff;
  // Moved to fp32's places, the exponent is 112 short; a product mends subnormals too.
  float x = bits_to_float(rest << 13) * bits_to_float(0x77800000);
  if (rest >= 0x7c00) x = bits_to_float(0x7f800000 | (rest & 0x3ff) << 13);
  return bits_to_float(float_to_bits(x) | sign);
}
inline void narrow(float x, Fp16* p) {
  uint32_t b = float_to_bits(x), sign = (b >> 16) & 0x8000, rest = b & 0x7fffffff;
  uint32_t h;
  if (rest > 0x7f800000) {
    h = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds to more than 65504
    h = 0x7c00;
  } else if (rest < 0x38800000) {  // subnormal: the sum with 1/2 rounds at the last place
    h = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000;
  } else {
    h = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  }
  p->bits = uint16_t(sign | h);
}
#endif

inline V widen_vector(const float* p) { return load(p); }
inline void narrow_vector(V x, float* p) { store(p, x); }

inline V widen_vector(const Bf16* p) {
  VH bits;
  std::memcpy(&bits, p, sizeof bits);
  return (V)(__builtin_convertvector(bits, VU) << 16);
}
inline void narrow_vector(V x, Bf16* p) {
  VU b = (VU)x, rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  VU nan = (VU)((b & 0x7fffffff) > 0x7f800000);
  VH bits = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), VH);
  std::memcpy(p, &bits, sizeof bits);
}

inline V widen_vector(const Fp16* p) {
#if defined(__F16C__) && defined(__AVX512F__) && defined(__AVX512DQ__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  V x;
  for (int i = 0; i < W; ++i) x[i] = widen(p + i);
  return x;
#endif
}
inline void narrow_vector(V x, Fp16* p) {
#if defined(__F16C__) && defined(__AVX512F__) && defined(__AVX512DQ__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) narrow(x[i], p + i);
#endif
}

template <class T>
inline void widen_row(const T* p, int count, float* row) {
  int i = 0;
  for (; i + W <= count; i += W) store(row + i, widen_vector(p + i));
  for (; i < count; ++i) row[i] = widen(p + i);
}
template <class T>
inline void narrow_row(const float* row, int count, T* p) {
  int i = 0;
  for (; i + W <= count; i += W) narrow_vector(load(row + i), p + i);
  for (; i < count; ++i) narrow(row[i], p + i);
}

// Where the steps of a tile stand: first, first + 1, ..., or at the places listed.
struct Places {
  int64_t first;
  const int64_t* list;
  int64_t operator[](int64_t step) const { return list ? list[first + step] : first + step; }
};

inline int padded(int width) { return (width + W - 1) / W * W; }

template <class T>
void load_tile(const T* data, int64_t row_stride, int64_t stride, Places places, int steps,
               int width, float* tile) {
  int lanes = padded(width);
  if (stride == 1) {
    for (int t = 0; t < steps; ++t) {
      float* row = tile + t * TILE;
      const T* p = data + places[t] * row_stride;
      widen_row(p, width, row);
      for (int c = width; c < lanes; ++c) row[c] = 0;
    }
    return;
  }
  const bool whole = row_stride == 1 && !places.list;  // steps stand side by side
  for (int c = 0; c < lanes; ++c) {
    const T* p = data + c * stride;
    int t = 0;
    if (c < width && whole)
      for (; t + W <= steps; t += W) {
        const V x = widen_vector(p + places[t]);
        for (int i = 0; i < W; ++i) tile[(t + i) * TILE + c] = x[i];
      }
    for (; t < steps; ++t) tile[t * TILE + c] = c < width ? widen(p + places[t] * row_stride) : 0;
  }
}

template <class T>
void store_tile(const float* tile, T* data, int64_t row_stride, int64_t stride, Places places,
                int steps, int width) {
  if (stride == 1) {
    for (int t = 0; t < steps; ++t)
      narrow_row(tile + t * TILE, width, data + places[t] * row_stride);
    return;
  }
  for (int c = 0; c < width; ++c)
    for (int t = 0; t < steps; ++t)
      narrow(tile[t * TILE + c], data + places[t] * row_stride + c * stride);
}

// Bring x[k, b, places, channel ...] into a tile; lanes past `width` are 0 up to the next vector.
void load_tile(const Tensor& x, int64_t k, int64_t b, int64_t channel, Places places, int steps,
               int width, float* tile) {
  int64_t start = k * x.stride[0] + b * x.stride[1] + channel * x.stride[3];
  if (x.type == FP32)
    load_tile((const float*)x.data + start, x.stride[2], x.stride[3], places, steps, width, tile);
  else if (x.type == BF16)
    load_tile((const Bf16*)x.data + start, x.stride[2], x.stride[3], places, steps, width, tile);
  else
    load_tile((const Fp16*)x.data + start, x.stride[2], x.stride[3], places, steps, width, tile);
}

void store_tile(const float* tile, const Tensor& x, int64_t k, int64_t b, int64_t channel,
                Places places, int steps, int width) {
  int64_t start = k * x.stride[0] + b * x.stride[1] + channel * x.stride[3];
  if (x.type == FP32)
    store_tile(tile, (float*)x.data + start, x.stride[2], x.stride[3], places, steps, width);
  else if (x.type == BF16)
    store_tile(tile, (Bf16*)x.data + start, x.stride[2], x.stride[3], places, steps, width);
  else
    store_tile(tile, (Fp16*)x.data + start, x.stride[2], x.stride[3], places, steps, width);
}

float load_one(const Tensor& x, int64_t index) {
  if (x.type == FP32) return widen((const float*)x.data + index);
  if (x.type == BF16) return widen((const Bf16*)x.data + index);
  return widen((const Fp16*)x.data + index);
}

void store_one(float value, const Tensor& x, int64_t index) {
  if (x.type == FP32)
    narrow(value, (float*)x.data + index);
  else if (x.type == BF16)
    narrow(value, (Bf16*)x.data + index);
  else
    narrow(value, (Fp16*)x.data + index);
}

// Steps of B or C as rows of `state` numbers.
void load_rows(const Tensor& x, int64_t k, int64_t b, int64_t first, int steps, int state,
               float* rows) {
  int64_t start = k * x.stride[0] + b * x.stride[1] + first * x.stride[2];
  for (int t = 0; t < steps; ++t, start += x.stride[2]) {
    if (x.type == FP32 && x.stride[3] == 1) {
      std::memcpy(rows + t * state, (const float*)x.data + start, state * sizeof(float));
    } else {
      for (int n = 0; n < state; ++n) rows[t * state + n] = load_one(x, start + n * x.stride[3]);
    }
  }
}

// Memory that a thread keeps between calls.
class Scratch {
 public:
  float* take(int64_t floats) {
    size_t need = size_t(floats) * sizeof(float) + 64;
    if (used_ == blocks_.size()) blocks_.emplace_back();
    Block& block = blocks_[used_++];
    if (block.size < need) {
      block.data.reset(new char[need]);
      block.size = need;
    }
    uintptr_t address = reinterpret_cast<uintptr_t>(block.data.get());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  void begin() { used_ = 0; }

 private:
  struct Block {
    std::unique_ptr<char[]> data;
    size_t size = 0;
  };
  std::vector<Block> blocks_;
  size_t used_ = 0;
};

Scratch& scratch() {
  static thread_local Scratch memory;
  memory.begin();
  return memory;
}

// Run task(0) ... task(count - 1) on so many threads. Returns false where memory ran out.
template <class Task>
bool run(int64_t count, int64_t threads, const Task& task) {
  std::atomic<bool> good{true};
  auto guarded = [&](int64_t i) {
    try {
      task(i);
    } catch (const std::bad_alloc&) {
      good = false;
    }
  };
  threads = std::max<int64_t>(1, std::min(threads, count));
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) guarded(i);
#else
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) guarded(i);
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads: those there are do it
  }
  work();
  for (auto& thread : others) thread.join();
#endif
  return good;
}

// The scan. Fields as scan_cpu.py fills them in, each of eight bytes.

struct Scan {
  int64_t orders_count, batch, length, dim, state, groups, softplus, threads;
  Tensor u, delta, B, C, z, out, dout, du, ddelta, dz, dB, dC;
  const float *A, *D, *bias, *initial, *fixed_B, *fixed_C, *dlast;  // contiguous
  float *last, *dA, *dD, *dbias, *dinitial, *dfixed_B, *dfixed_C;   // contiguous
  const uint8_t* flags;
  int64_t flags_stride[2];
  const int64_t* orders;  // (K, L), of what stands by token; null: by step

  int64_t group_dim() const { return dim / groups; }
  bool cross() const { return orders != nullptr; }
};

// One tile of channels of one order (or group) and sample.
struct Tile {
  int64_t k, b, channel;  // order, sample, first channel
  int64_t row;            // order or group, the first index of B and C
  int width, vectors;
  int64_t parameter(const Scan& p) const { return k * p.dim + channel; }
};

// x[(channel, state)] as vectors [vectors][state], scaled; 0 past the width.
void load_matrix(const float* x, const Tile& tile, int64_t channel, int state, float scale,
                 float* out) {
  std::memset(out, 0, sizeof(float) * tile.vectors * state * W);
  for (int c = 0; c < tile.width; ++c)
    for (int n = 0; n < state; ++n)
      out[(c / W * state + n) * W + c % W] = scale * x[(channel + c) * state + n];
}

// The inverse.
void store_matrix(const float* in, const Tile& tile, int64_t channel, int state, float* x) {
  for (int c = 0; c < tile.width; ++c)
    for (int n = 0; n < state; ++n)
      x[(channel + c) * state + n] = in[(c / W * state + n) * W + c % W];
}

void load_vector(const float* x, const Tile& tile, int64_t channel, float* out) {
  for (int c = 0; c < tile.vectors * W; ++c) out[c] = x && c < tile.width ? x[channel + c] : 0;
}

// What the inner loops read: one vector of channels, `steps` steps.
struct Steps {
  int steps, state;
  const float *step, *u;  // rows of TILE
  const float* A;         // [state] vectors, log2(e) A
  const float *B, *C;     // rows of `state` numbers, or [state] vectors where fixed
  const float* D;         // one vector
  const uint8_t* flags;   // or null
  int64_t flags_stride;
  int flag(int t) const { return flags ? flags[t * flags_stride] : 0; }
};

template <bool FIXED>
inline V coefficient(const float* x, int t, int n, int state) {
  return FIXED ? load(x + n * W) : splat(x[t * state + n]);
}

// Do something for each state; STATE: their number, where the compiler knows it, else 0.
template <int STATE, class Function>
inline void each_state(int state, const Function& function) {
  if (STATE) {
#pragma GCC unroll 16
    for (int n = 0; n < STATE; ++n) function(n);
  } else {
    for (int n = 0; n < state; ++n) function(n);
  }
}

// h moves through the steps; y, if it is not null, are rows of TILE. With KEEP decays and states
// are written too: decay[t], states[t + 1], vectors [state] each, states[0] being the beginning.
template <int STATE, bool FIXED_B, bool FIXED_C, bool KEEP>
void forward_steps(const Steps& s, float* memory, float* y, float* decay, float* states) {
  const int state = STATE ? STATE : s.state;
  const int64_t size = int64_t(state) * W;
  const V D = load(s.D);
  V h[STATE ? STATE : MOST_STATES];
  each_state<STATE>(state, [&](int n) { h[n] = load(memory + n * W); });
  if (KEEP) std::memcpy(states, memory, sizeof(float) * size);
  for (int t = 0; t < s.steps; ++t) {
    const int flag = s.flag(t);
    float *to_decay = decay + t * size, *to_states = states + (t + 1) * size;
    if (flag & RESET) each_state<STATE>(state, [&](int n) { h[n] = V{}; });
    if (flag & SKIP) {
      if (y) store(y + t * TILE, V{});
      if (KEEP)
        each_state<STATE>(state, [&](int n) {
          store(to_decay + n * W, splat(1.0f));
          store(to_states + n * W, h[n]);
        });
      continue;
    }
    const V step = load(s.step + t * TILE), u = load(s.u + t * TILE), moved = step * u;
    V sum[4] = {D * u, V{}, V{}, V{}};
    each_state<STATE>(state, [&](int n) {
      const V a = exp2(step * load(s.A + n * W));
      h[n] = h[n] * a + moved * coefficient<FIXED_B>(s.B, t, n, state);
      if (KEEP) {
        store(to_decay + n * W, a);
        store(to_states + n * W, h[n]);
      }
      sum[n & 3] += h[n] * coefficient<FIXED_C>(s.C, t, n, state);
    });
    if (y) store(y + t * TILE, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (KEEP && (flag & RESET)) std::memset(to_decay, 0, sizeof(float) * size);
  }
  each_state<STATE>(state, [&](int n) { store(memory + n * W, h[n]); });
}

// What the backward's inner loop writes besides; null where not needed.
struct Sums {
  float* dA;          // [state] vectors
  float *dB, *dC;     // rows of `padded` numbers, or [state] vectors where fixed
  float* dD;          // one vector
  float *du, *dstep;  // rows of TILE
};

// rows += sums over the lanes of factor * vectors[n], one number for each state.
template <int STATE>
inline void add_lane_sums(int state, V factor, const float* vectors, float* row) {
  for (int first = 0; first < state; first += W) {
    V product[W];
    for (int i = 0; i < W; ++i)
      product[i] = first + i < state ? factor * load(vectors + (first + i) * W) : V{};
    store(row + first, load(row + first) + sums(product));
  }
}

// vectors += factor * others
template <int STATE>
inline void add_products(int state, V factor, const float* others, float* vectors) {
  each_state<STATE>(state, [&](int n) {
    store(vectors + n * W, load(vectors + n * W) + factor * load(others + n * W));
  });
}

template <int STATE, bool FIXED_B, bool FIXED_C>
void backward_steps(const Steps& s, const float* dy, const float* decay, const float* states,
                    float* carry, const Sums& to, bool need_gradient) {
  const int state = STATE ? STATE : s.state;
  const int64_t size = int64_t(state) * W;
  const V D = load(s.D);
  V dD{};
  alignas(64) float g[(STATE ? STATE : MOST_STATES) * W];
  for (int t = s.steps - 1; t >= 0; --t) {
    const int flag = s.flag(t);
    const float *a = decay + t * size, *before = states + t * size, *h = before + size;
    if (flag & SKIP) {
      if (flag & RESET) std::memset(carry, 0, sizeof(float) * size);
      if (to.du) store(to.du + t * TILE, V{});
      if (to.dstep) store(to.dstep + t * TILE, V{});
      continue;
    }
    const V y = load(dy + t * TILE), step = load(s.step + t * TILE), u = load(s.u + t * TILE);
    if (to.dD) dD += y * u;
    if (to.dC && FIXED_C) add_products<STATE>(state, y, h, to.dC);
    if (to.dC && !FIXED_C) add_lane_sums<STATE>(state, y, h, to.dC + int64_t(t) * padded(state));
    if (!need_gradient) continue;
    V through[2] = {V{}, V{}};  // <B, g>
    each_state<STATE>(state, [&](int n) {
      const V x = load(carry + n * W) + y * coefficient<FIXED_C>(s.C, t, n, state);
      store(g + n * W, x);
      through[n & 1] += x * coefficient<FIXED_B>(s.B, t, n, state);
    });
    const V shared = through[0] + through[1];
    if (to.dB && FIXED_B) add_products<STATE>(state, step * u, g, to.dB);
    if (to.dB && !FIXED_B)
      add_lane_sums<STATE>(state, step * u, g, to.dB + int64_t(t) * padded(state));
    if (to.du) store(to.du + t * TILE, step * shared + y * D);
    if (!to.dstep && !to.dA) {
      each_state<STATE>(state,
                        [&](int n) { store(carry + n * W, load(g + n * W) * load(a + n * W)); });
      continue;
    }
    V powers[2] = {V{}, V{}};  // <log2(e) A, q>
    each_state<STATE>(state, [&](int n) {
      const V next = load(g + n * W) * load(a + n * W), q = next * load(before + n * W);
      store(carry + n * W, next);
      powers[n & 1] += q * load(s.A + n * W);
      if (to.dA) store(to.dA + n * W, load(to.dA + n * W) + q * step);
    });
    if (to.dstep) store(to.dstep + t * TILE, (powers[0] + powers[1]) * LN_2 + u * shared);
  }
  if (to.dD) store(to.dD, load(to.dD) + dD);
}

typedef void (*Forward)(const Steps&, float*, float*, float*, float*);
typedef void (*Backward)(const Steps&, const float*, const float*, const float*, float*,
                         const Sums&, bool);

template <bool KEEP>
Forward choose_forward(const Scan& p) {
  if (p.fixed_B && p.fixed_C) return forward_steps<0, true, true, KEEP>;
  if (p.fixed_B) return forward_steps<0, true, false, KEEP>;
  if (p.fixed_C) return forward_steps<0, false, true, KEEP>;
  if (p.state == 16) return forward_steps<16, false, false, KEEP>;
  return forward_steps<0, false, false, KEEP>;
}

Backward choose_backward(const Scan& p) {
  if (p.fixed_B && p.fixed_C) return backward_steps<0, true, true>;
  if (p.fixed_B) return backward_steps<0, true, false>;
  if (p.fixed_C) return backward_steps<0, false, true>;
  if (p.state == 16) return backward_steps<16, false, false>;
  return backward_steps<0, false, false>;
}

// delta of a tile becomes delta + bias; step its softplus.
void prepare(const Scan& p, const Tile& tile, const float* bias, int steps, float* delta,
             float* step) {
  for (int t = 0; t < steps; ++t)
    for (int v = 0; v < tile.vectors; ++v) {
      float* at = delta + t * TILE + v * W;
      V x = load(at) + load(bias + v * W);
      store(at, x);
      store(step + t * TILE + v * W, p.softplus ? softplus(x) : x);
    }
}

// What a tile reads of the parameters, as vectors.
struct Parameters {
  float *A, *B, *C, *D, *bias;  // B and C null unless fixed
  Parameters(const Scan& p, Scratch& memory) {
    const int64_t matrix = TILE * p.state;
    A = memory.take(matrix), D = memory.take(TILE), bias = memory.take(TILE);
    B = p.fixed_B ? memory.take(matrix) : nullptr;
    C = p.fixed_C ? memory.take(matrix) : nullptr;
  }
  void load(const Scan& p, const Tile& tile) {
    const int64_t channel = tile.parameter(p);
    const int state = int(p.state);
    load_matrix(p.A, tile, channel, state, LOG2_E, A);
    if (B) load_matrix(p.fixed_B, tile, channel, state, 1, B);
    if (C) load_matrix(p.fixed_C, tile, channel, state, 1, C);
    load_vector(p.D, tile, channel, D);
    load_vector(p.bias, tile, channel, bias);
  }
  Steps steps(const Scan& p, const Tile& tile, int v, int64_t first, int count, const float* step,
              const float* u, const float* b, const float* c) const {
    const int64_t at = int64_t(v) * p.state * W;
    const uint8_t* flags = p.flags;
    if (flags) flags += tile.b * p.flags_stride[0] + first * p.flags_stride[1];
    return {count,          int(p.state),   step + v * W, u + v * W, A + at,
            B ? B + at : b, C ? C + at : c, D + v * W,    flags,     p.flags_stride[1]};
  }
};

void start_states(const Scan& p, const Tile& tile, float* h) {
  if (p.initial)
    load_matrix(p.initial, tile, tile.b * p.dim + tile.channel, p.state, 1, h);
  else
    std::memset(h, 0, sizeof(float) * TILE * p.state);
}

// y += tile rows at their tokens.
void add_rows(const float* tile, Places places, int steps, int lanes, float* y) {
  for (int t = 0; t < steps; ++t) {
    float* row = y + places[t] * TILE;
    for (int c = 0; c < lanes; c += W) store(row + c, load(row + c) + load(tile + t * TILE + c));
  }
}

void zero_skipped(const Scan& p, const Tile& tile, int64_t first, int steps, float* rows) {
  if (!p.flags) return;
  const uint8_t* flags = p.flags + tile.b * p.flags_stride[0] + first * p.flags_stride[1];
  for (int t = 0; t < steps; ++t)
    if (flags[t * p.flags_stride[1]] & SKIP) std::memset(rows + t * TILE, 0, sizeof(float) * TILE);
}

// out = scale * y silu(z), a few steps at a time.
void gate_and_store(const Scan& p, const Tile& tile, int64_t first, int64_t steps, float scale,
                    float* y, float* z) {
  for (int64_t t0 = 0; t0 < steps; t0 += TILE_STEPS) {
    int count = int(std::min<int64_t>(TILE_STEPS, steps - t0));
    float* rows = y + t0 * TILE;
    if (p.z.data) {
      load_tile(p.z, 0, tile.b, tile.channel, {first + t0, nullptr}, count, tile.width, z);
      for (int t = 0; t < count; ++t)
        for (int v = 0; v < tile.vectors; ++v) {
          float* at = rows + t * TILE + v * W;
          store(at, load(at) * scale * silu(load(z + t * TILE + v * W)));
        }
      if (!p.cross()) zero_skipped(p, tile, first + t0, count, rows);
    }
    store_tile(rows, p.out, 0, tile.b, tile.channel, {first + t0, nullptr}, count, tile.width);
  }
}

void forward_tile(const Scan& p, Tile tile, Scratch& memory) {
  const int state = int(p.state);
  float* y = memory.take((p.cross() ? p.length : TILE_STEPS) * TILE);
  float *u = memory.take(TILE_STEPS * TILE), *delta = memory.take(TILE_STEPS * TILE);
  float *step = memory.take(TILE_STEPS * TILE), *part = memory.take(TILE_STEPS * TILE);
  float *b = memory.take(TILE_STEPS * state), *c = memory.take(TILE_STEPS * state);
  float* h = memory.take(TILE * state);
  if (p.cross()) std::memset(y, 0, sizeof(float) * p.length * TILE);
  const Forward forward = choose_forward<false>(p);
  Parameters parameters(p, memory);
  for (int64_t k = 0; k < p.orders_count; ++k) {
    tile.k = k;
    if (p.cross()) tile.row = k;
    parameters.load(p, tile);
    start_states(p, tile, h);
    for (int64_t t0 = 0; t0 < p.length; t0 += TILE_STEPS) {
      const int count = int(std::min<int64_t>(TILE_STEPS, p.length - t0));
      load_tile(p.u, k, tile.b, tile.channel, {t0, nullptr}, count, tile.width, u);
      load_tile(p.delta, k, tile.b, tile.channel, {t0, nullptr}, count, tile.width, delta);
      prepare(p, tile, parameters.bias, count, delta, step);
      if (!p.fixed_B) load_rows(p.B, tile.row, tile.b, t0, count, state, b);
      if (!p.fixed_C) load_rows(p.C, tile.row, tile.b, t0, count, state, c);
      for (int v = 0; v < tile.vectors; ++v)
        forward(parameters.steps(p, tile, v, t0, count, step, u, b, c), h + v * state * W,
                part + v * W, nullptr, nullptr);
      if (p.cross())
        add_rows(part, {t0, p.orders + k * p.length}, count, tile.vectors * W, y);
      else
        gate_and_store(p, tile, t0, count, 1, part, delta);
    }
    if (p.last) store_matrix(h, tile, tile.b * p.dim + tile.channel, state, p.last);
  }
  if (p.cross()) gate_and_store(p, tile, 0, p.length, 1.0f / float(p.orders_count), y, delta);
}

// Where sums over channels and samples wait to be added up, by tile range and by sample.
struct Partial {
  std::vector<float> B, C;                          // (slabs, rows, batch, L, padded N)
  std::vector<float> A, D, bias, fixed_B, fixed_C;  // (batch, K, dim, N) or (batch, K, dim)
};

void backward_tile(const Scan& p, Tile tile, Partial& partial, float* dB, float* dC,
                   Scratch& memory) {
  const int state = int(p.state), rows = padded(state);
  const bool need_step = p.ddelta.data || p.dbias, need_decay = need_step || p.dA;
  const bool need_gradient = need_decay || p.du.data || p.dB.data || p.dfixed_B || p.dinitial;
  const bool need_output = p.dz.data;
  const bool need_C = p.dC.data || p.dfixed_C;
  const bool need_inner = need_gradient || need_C || p.dD;
  const bool need_states = need_decay || need_C || need_output;
  const int64_t size = int64_t(state) * W;  // of one vector's states
  const int64_t kept = std::max<int64_t>(32, KEPT_BYTES / int64_t(2 * sizeof(float) * size));
  const int steps = int(std::min(kept, std::max<int64_t>(1, p.length)));
  const int64_t chunks = (p.length + steps - 1) / steps;
  const float scale = p.cross() ? 1.0f / float(p.orders_count) : 1.0f;
  const int64_t tokens = p.cross() ? p.length : steps;

  float *u = memory.take(int64_t(steps) * TILE), *delta = memory.take(int64_t(steps) * TILE);
  float *step = memory.take(int64_t(steps) * TILE), *dstep = memory.take(int64_t(steps) * TILE);
  float *dy = memory.take(int64_t(steps) * TILE), *y = memory.take(int64_t(steps) * TILE);
  float *b = memory.take(int64_t(steps) * state), *c = memory.take(int64_t(steps) * state);
  float *decay = memory.take(steps * size), *states = memory.take((steps + 1) * size);
  float* starts = memory.take(std::max<int64_t>(chunks, 1) * TILE * state);
  float *carry = memory.take(TILE * state), *h = memory.take(TILE * state);
  float *dA = memory.take(TILE * state), *dD = memory.take(TILE), *dbias = memory.take(TILE);
  float *dfixed_B = memory.take(TILE * state), *dfixed_C = memory.take(TILE * state);
  // By token for a cross scan: all orders share them.
  float *total = memory.take(tokens * TILE), *gate = memory.take(tokens * TILE);
  float* dout = memory.take(tokens * TILE);

  const Forward pass = choose_forward<false>(p), keep = choose_forward<true>(p);
  const Backward backward = choose_backward(p);
  Parameters parameters(p, memory);

  // dout and z of some tokens; dout becomes that of the sum before the gate.
  auto load_gate = [&](int64_t first, int64_t count, float* to) {
    load_tile(p.dout, 0, tile.b, tile.channel, {first, nullptr}, int(count), tile.width, dout);
    if (p.z.data)
      load_tile(p.z, 0, tile.b, tile.channel, {first, nullptr}, int(count), tile.width, gate);
    for (int64_t t = 0; t < count; ++t)
      for (int v = 0; v < tile.vectors; ++v) {
        const int64_t at = t * TILE + v * W;
        V d = load(dout + at);
        if (p.z.data) d = d * scale * silu(load(gate + at));
        store(to + at, d);
      }
  };
  auto store_gate = [&](int64_t first, int64_t count, float* sum) {
    for (int64_t t = 0; t < count; ++t)
      for (int v = 0; v < tile.vectors; ++v) {
        const int64_t at = t * TILE + v * W;
        store(sum + at, load(sum + at) * scale * load(dout + at) * dsilu(load(gate + at)));
      }
    if (!p.cross()) zero_skipped(p, tile, first, int(count), sum);
    store_tile(sum, p.dz, 0, tile.b, tile.channel, {first, nullptr}, int(count), tile.width);
  };

  float* dy_tokens = nullptr;
  if (p.cross()) {
    dy_tokens = memory.take(tokens * TILE);
    load_gate(0, p.length, dy_tokens);
    std::memset(total, 0, sizeof(float) * tokens * TILE);
  }
  for (int64_t k = 0; k < p.orders_count; ++k) {
    tile.k = k;
    if (p.cross()) tile.row = k;
    parameters.load(p, tile);
    std::memset(dA, 0, sizeof(float) * TILE * state);
    std::memset(dfixed_B, 0, sizeof(float) * TILE * state);
    std::memset(dfixed_C, 0, sizeof(float) * TILE * state);
    std::memset(dD, 0, sizeof(float) * TILE);
    std::memset(dbias, 0, sizeof(float) * TILE);
    if (p.dlast)
      load_matrix(p.dlast, tile, tile.b * p.dim + tile.channel, state, 1, carry);
    else
      std::memset(carry, 0, sizeof(float) * TILE * state);

    auto load_inputs = [&](int64_t t0, int count) {
      load_tile(p.u, k, tile.b, tile.channel, {t0, nullptr}, count, tile.width, u);
      load_tile(p.delta, k, tile.b, tile.channel, {t0, nullptr}, count, tile.width, delta);
      prepare(p, tile, parameters.bias, count, delta, step);
      if (!p.fixed_B) load_rows(p.B, tile.row, tile.b, t0, count, state, b);
      if (!p.fixed_C) load_rows(p.C, tile.row, tile.b, t0, count, state, c);
    };
    start_states(p, tile, starts);
    for (int64_t i = 0; need_states && i + 1 < chunks;
         ++i) {  // the states at the beginning of each chunk
      load_inputs(i * steps, steps);
      std::memcpy(h, starts + i * TILE * state, sizeof(float) * TILE * state);
      for (int v = 0; v < tile.vectors; ++v)
        pass(parameters.steps(p, tile, v, i * steps, steps, step, u, b, c), h + v * size, nullptr,
             nullptr, nullptr);
      std::memcpy(starts + (i + 1) * TILE * state, h, sizeof(float) * TILE * state);
    }
    for (int64_t i = chunks - 1; i >= 0; --i) {
      const int64_t t0 = i * steps;
      const int count = int(std::min<int64_t>(steps, p.length - t0));
      const Places places{t0, p.cross() ? p.orders + k * p.length : nullptr};
      load_inputs(t0, count);
      if (p.cross())
        for (int t = 0; t < count; ++t)
          std::memcpy(dy + t * TILE, dy_tokens + places[t] * TILE, sizeof(float) * TILE);
      else
        load_gate(t0, count, dy);
      for (int v = 0; v < tile.vectors; ++v) {
        const Steps inputs = parameters.steps(p, tile, v, t0, count, step, u, b, c);
        std::memcpy(h, starts + i * TILE * state + v * size, sizeof(float) * size);
        keep(inputs, h, need_output ? y + v * W : nullptr, decay, states);
        if (!need_inner) continue;
        Sums sums{p.dA ? dA + v * size : nullptr,
                  p.dfixed_B  ? dfixed_B + v * size
                  : p.dB.data ? dB + (k * p.batch * p.length + t0) * rows
                              : nullptr,
                  p.dfixed_C  ? dfixed_C + v * size
                  : p.dC.data ? dC + (k * p.batch * p.length + t0) * rows
                              : nullptr,
                  p.dD ? dD + v * W : nullptr,
                  p.du.data ? u + v * W : nullptr,
                  need_step ? dstep + v * W : nullptr};
        backward(inputs, dy + v * W, decay, states, carry + v * size, sums, need_gradient);
      }
      if (need_output) {
        if (p.cross())
          add_rows(y, places, count, tile.vectors * W, total);
        else
          store_gate(t0, count, y);
      }
      if (p.du.data) store_tile(u, p.du, k, tile.b, tile.channel, {t0, nullptr}, count, tile.width);
      if (need_step) {
        for (int t = 0; t < count; ++t)
          for (int v = 0; v < tile.vectors; ++v) {
            const int64_t at = t * TILE + v * W;
            V d = load(dstep + at);
            if (p.softplus) d *= sigmoid(load(delta + at));
            store(dstep + at, d);
          }
        zero_skipped(p, tile, t0, count, dstep);
        for (int t = 0; t < count; ++t)
          for (int v = 0; v < tile.vectors; ++v)
            store(dbias + v * W, load(dbias + v * W) + load(dstep + t * TILE + v * W));
        if (p.ddelta.data)
          store_tile(dstep, p.ddelta, k, tile.b, tile.channel, {t0, nullptr}, count, tile.width);
      }
    }
    const int64_t channel = (tile.b * p.orders_count + k) * p.dim + tile.channel;
    if (p.dA) store_matrix(dA, tile, channel, state, partial.A.data());
    if (p.dfixed_B) store_matrix(dfixed_B, tile, channel, state, partial.fixed_B.data());
    if (p.dfixed_C) store_matrix(dfixed_C, tile, channel, state, partial.fixed_C.data());
    if (p.dD) std::copy(dD, dD + tile.width, partial.D.data() + channel);
    if (p.dbias) std::copy(dbias, dbias + tile.width, partial.bias.data() + channel);
    if (p.dinitial) store_matrix(carry, tile, tile.b * p.dim + tile.channel, state, p.dinitial);
  }
  if (p.cross() && need_output) store_gate(0, p.length, total);
}

// The sum over samples, in their order.
void add_samples(const std::vector<float>& partial, int64_t batch, float* out) {
  if (!out) return;
  const int64_t size = batch ? int64_t(partial.size()) / batch : 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < size; ++i) out[i] = b ? out[i] + partial[b * size + i] : partial[i];
}

// dB or dC: the sum over slabs, in their order.
void add_slabs(const Scan& p, const std::vector<float>& partial, int64_t slabs, const Tensor& out) {
  if (!out.data) return;
  const int64_t state = p.state, width = padded(int(state)),
                all = p.cross() ? p.orders_count : p.groups;
  run(all * p.batch, p.threads, [&](int64_t task) {
    const int64_t k = task / p.batch, b = task % p.batch;
    for (int64_t t = 0; t < p.length; ++t)
      for (int64_t n = 0; n < state; ++n) {
        float sum = 0;
        for (int64_t slab = 0; slab < slabs; ++slab)
          sum += partial[(((slab * all + k) * p.batch + b) * p.length + t) * width + n];
        store_one(sum, out,
                  k * out.stride[0] + b * out.stride[1] + t * out.stride[2] + n * out.stride[3]);
      }
  });
}

// The convolution.

struct Conv {
  int64_t orders_count, batch, length, dim, width, silu, threads;
  Tensor x, out, dout, dx;
  const float *weight, *bias;  // (K, D, W), (K, D)
  float *dweight, *dbias;
  const int64_t* orders;
};

// Taps of an order as vectors [vectors][width].
struct Taps {
  float *weight, *bias;
  Taps(const Conv& p, int64_t k, int64_t channel, int width, Scratch& memory) {
    weight = memory.take(p.width * TILE), bias = memory.take(TILE);
    load(p, k, channel, width);
  }
  void load(const Conv& p, int64_t k, int64_t channel, int width) {
    std::memset(weight, 0, sizeof(float) * p.width * TILE);
    std::memset(bias, 0, sizeof(float) * TILE);
    for (int c = 0; c < width; ++c) {
      const int64_t at = k * p.dim + channel + c;
      for (int64_t w = 0; w < p.width; ++w)
        weight[(c / W * p.width + w) * W + c % W] = p.weight[at * p.width + w];
      if (p.bias) bias[c] = p.bias[at];
    }
  }
};

// The convolution before its activation at step t.
inline V convolve(const Conv& p, const Taps& taps, const float* x, const int64_t* order, int64_t t,
                  int v) {
  V sum = load(taps.bias + v * W);
  for (int64_t w = std::max<int64_t>(0, p.width - 1 - t); w < p.width; ++w)
    sum += load(taps.weight + (v * p.width + w) * W) *
           load(x + order[t - p.width + 1 + w] * TILE + v * W);
  return sum;
}

void conv_forward_tile(const Conv& p, int64_t b, int64_t channel, int width, Scratch& memory) {
  float *x = memory.take(p.length * TILE), *y = memory.take(TILE_STEPS * TILE);
  const int vectors = padded(width) / W;
  load_tile(p.x, 0, b, channel, {0, nullptr}, int(p.length), width, x);
  Taps taps(p, 0, channel, width, memory);
  for (int64_t k = 0; k < p.orders_count; ++k) {
    if (k) taps.load(p, k, channel, width);
    const int64_t* order = p.orders + k * p.length;
    for (int64_t t0 = 0; t0 < p.length; t0 += TILE_STEPS) {
      const int count = int(std::min<int64_t>(TILE_STEPS, p.length - t0));
      for (int t = 0; t < count; ++t)
        for (int v = 0; v < vectors; ++v) {
          V sum = convolve(p, taps, x, order, t0 + t, v);
          store(y + t * TILE + v * W, p.silu ? silu(sum) : sum);
        }
      store_tile(y, p.out, k, b, channel, {t0, nullptr}, count, width);
    }
  }
}

void conv_backward_tile(const Conv& p, int64_t b, int64_t channel, int width,
                        std::vector<float>& dweight, std::vector<float>& dbias, Scratch& memory) {
  float *x = memory.take(p.length * TILE), *dx = memory.take(p.length * TILE);
  float *dy = memory.take(TILE_STEPS * TILE), *dw = memory.take(p.width * TILE),
        *db = memory.take(TILE);
  const int vectors = padded(width) / W;
  load_tile(p.x, 0, b, channel, {0, nullptr}, int(p.length), width, x);
  std::memset(dx, 0, sizeof(float) * p.length * TILE);
  Taps taps(p, 0, channel, width, memory);
  for (int64_t k = 0; k < p.orders_count; ++k) {
    if (k) taps.load(p, k, channel, width);
    const int64_t* order = p.orders + k * p.length;
    std::memset(dw, 0, sizeof(float) * p.width * TILE);
    std::memset(db, 0, sizeof(float) * TILE);
    for (int64_t t0 = 0; t0 < p.length; t0 += TILE_STEPS) {
      const int count = int(std::min<int64_t>(TILE_STEPS, p.length - t0));
      load_tile(p.dout, k, b, channel, {t0, nullptr}, count, width, dy);
      for (int i = 0; i < count; ++i)
        for (int v = 0; v < vectors; ++v) {
          const int64_t t = t0 + i;
          V d = load(dy + i * TILE + v * W);
          if (p.silu) d *= dsilu(convolve(p, taps, x, order, t, v));
          store(db + v * W, load(db + v * W) + d);
          for (int64_t w = std::max<int64_t>(0, p.width - 1 - t); w < p.width; ++w) {
            const int64_t row = order[t - p.width + 1 + w] * TILE + v * W,
                          tap = (v * p.width + w) * W;
            if (p.dweight) store(dw + tap, load(dw + tap) + d * load(x + row));
            if (p.dx.data) store(dx + row, load(dx + row) + d * load(taps.weight + tap));
          }
        }
    }
    const int64_t at = (b * p.orders_count + k) * p.dim + channel;
    for (int c = 0; c < width; ++c) {
      if (p.dbias) dbias[at + c] = db[c];
      if (p.dweight)
        for (int64_t w = 0; w < p.width; ++w)
          dweight[(at + c) * p.width + w] = dw[(c / W * p.width + w) * W + c % W];
    }
  }
  if (p.dx.data) store_tile(dx, p.dx, 0, b, channel, {0, nullptr}, int(p.length), width);
}

bool within(const int64_t* orders, int64_t count, int64_t length) {
  return std::all_of(orders, orders + count * length,
                     [=](int64_t t) { return t >= 0 && t < length; });
}

template <class Function>
int guarded(const Function& function) {
  try {
    return function() ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// Each returns 0, 1 where memory ran out, or 2 where an order names a token that does not exist.
extern "C" {

int emrrg_scan_forward(const Scan* scan) {
  const Scan& p = *scan;
  if (p.cross() && !within(p.orders, p.orders_count, p.length)) return 2;
  const int64_t tiles = (p.group_dim() + TILE - 1) / TILE;
  return guarded([&] {
    return run(p.batch * p.groups * tiles, p.threads, [&](int64_t task) {
      const int64_t b = task / (p.groups * tiles), g = task / tiles % p.groups,
                    first = task % tiles * TILE;
      const int width = int(std::min<int64_t>(TILE, p.group_dim() - first));
      forward_tile(p, {0, b, g * p.group_dim() + first, g, width, padded(width) / W}, scratch());
    });
  });
}

int emrrg_scan_backward(const Scan* scan) {
  const Scan& p = *scan;
  if (p.cross() && !within(p.orders, p.orders_count, p.length)) return 2;
  const int64_t rows = padded(int(p.state)), all = p.cross() ? p.orders_count : p.groups;
  // Channels of a slab add up dB and dC in place; slabs are many enough for any number of cores,
  // and so wide that their sums need less memory than the inputs.
  const int64_t least = std::max<int64_t>(TILE, 4 * rows / TILE * TILE);
  const int64_t wanted = std::max<int64_t>(1, 64 / std::max<int64_t>(1, p.batch * p.groups));
  const int64_t slabs_most = std::max<int64_t>(1, (p.group_dim() + least - 1) / least);
  int64_t slab = (p.group_dim() + std::min(wanted, slabs_most) - 1) / std::min(wanted, slabs_most);
  slab = std::max<int64_t>(TILE, (slab + TILE - 1) / TILE * TILE);
  const int64_t slabs = (p.group_dim() + slab - 1) / slab;
  return guarded([&] {
    Partial partial;
    const int64_t sequence = p.length * rows, samples = p.batch * p.orders_count * p.dim;
    if (p.dB.data) partial.B.resize(slabs * all * p.batch * sequence);
    if (p.dC.data) partial.C.resize(slabs * all * p.batch * sequence);
    if (p.dA) partial.A.resize(samples * p.state);
    if (p.dfixed_B) partial.fixed_B.resize(samples * p.state);
    if (p.dfixed_C) partial.fixed_C.resize(samples * p.state);
    if (p.dD) partial.D.resize(samples);
    if (p.dbias) partial.bias.resize(samples);
    const bool good = run(p.batch * p.groups * slabs, p.threads, [&](int64_t task) {
      const int64_t b = task / (p.groups * slabs), g = task / slabs % p.groups, s = task % slabs;
      const int64_t sums = ((s * all + g) * p.batch + b) * sequence;
      const int64_t end = std::min(p.group_dim(), (s + 1) * slab);
      for (int64_t first = s * slab; first < end; first += TILE) {
        const int width = int(std::min<int64_t>(TILE, end - first));
        backward_tile(p, {0, b, g * p.group_dim() + first, g, width, padded(width) / W}, partial,
                      p.dB.data ? partial.B.data() + sums : nullptr,
                      p.dC.data ? partial.C.data() + sums : nullptr, scratch());
      }
    });
    add_slabs(p, partial.B, slabs, p.dB);
    add_slabs(p, partial.C, slabs, p.dC);
    add_samples(partial.A, p.batch, p.dA);
    add_samples(partial.D, p.batch, p.dD);
    add_samples(partial.bias, p.batch, p.dbias);
    add_samples(partial.fixed_B, p.batch, p.dfixed_B);
    add_samples(partial.fixed_C, p.batch, p.dfixed_C);
    return good;
  });
}

int emrrg_conv_forward(const Conv* conv) {
  const Conv& p = *conv;
  if (!within(p.orders, p.orders_count, p.length)) return 2;
  const int64_t tiles = (p.dim + TILE - 1) / TILE;
  return guarded([&] {
    return run(p.batch * tiles, p.threads, [&](int64_t task) {
      const int64_t first = task % tiles * TILE;
      conv_forward_tile(p, task / tiles, first, int(std::min<int64_t>(TILE, p.dim - first)),
                        scratch());
    });
  });
}

int emrrg_conv_backward(const Conv* conv) {
  const Conv& p = *conv;
  if (!within(p.orders, p.orders_count, p.length)) return 2;
  const int64_t tiles = (p.dim + TILE - 1) / TILE;
  return guarded([&] {
    std::vector<float> dweight, dbias;
    if (p.dweight) dweight.resize(p.batch * p.orders_count * p.dim * p.width);
    if (p.dbias) dbias.resize(p.batch * p.orders_count * p.dim);
    const bool good = run(p.batch * tiles, p.threads, [&](int64_t task) {
      const int64_t first = task % tiles * TILE;
      conv_backward_tile(p, task / tiles, first, int(std::min<int64_t>(TILE, p.dim - first)),
                         dweight, dbias, scratch());
    });
    add_samples(dweight, p.batch, p.dweight);
    add_samples(dbias, p.batch, p.dbias);
    return good;
  });
}
}
