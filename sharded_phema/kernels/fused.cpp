// One pass over many tensors: each element of the parameters is read once, and each average read and written once.
//
// Plain C interface, so that no header of torch or Python is needed and building takes about a second.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

using Index = std::int64_t;

inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Dtypes of parameters. Whether a number is NaN or infinite is asked of its bits: comparisons may be optimised away.
struct Single {
    using Stored = float;
    static float widened(float value) { return value; }
    static bool odd(float value) { return (to_bits(value) & 0x7f800000u) == 0x7f800000u; }
};

struct Brain {
    using Stored = std::uint16_t;
    static float widened(std::uint16_t value) { return from_bits(static_cast<std::uint32_t>(value) << 16); }
    static bool odd(std::uint16_t value) { return (value & 0x7f80u) == 0x7f80u; }
};

struct Half {
    using Stored = std::uint16_t;
    // By whole numbers, so that threads that flush subnormals keep those of float16.
    static float widened(std::uint16_t value) {
        const std::uint32_t magnitude = value & 0x7fffu, sign = static_cast<std::uint32_t>(value & 0x8000u) << 16;
        if (magnitude < 0x0400u) return from_bits(to_bits(static_cast<float>(magnitude) * 0x1p-24f) | sign);
        return from_bits(((magnitude << 13) + ((magnitude >= 0x7c00u ? 224u : 112u) << 23)) | sign);
    }
    static bool odd(std::uint16_t value) { return (value & 0x7c00u) == 0x7c00u; }
};

struct Double {
    using Stored = double;
    static float widened(double value) { return static_cast<float>(value); }
    static bool odd(double value) { return Single::odd(widened(value)); }
};

// Fused where the machine can, as torch's own lerp does; elsewhere the call would be a slow function.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Averages that are moved in one pass, and how: from the average for small weights, from the parameter for others,
// so that weight 1 gives the parameter itself.
constexpr int MOST = 4;

struct Moves {
    int count = 0;
    Index which[MOST];
    float factor[MOST];
    bool from_param[MOST];
};

template <class Kind, int COUNT>
void move(const typename Kind::Stored* __restrict param, float* const* averages, const Moves& moves, Index begin,
          Index count) {
    float* __restrict out[COUNT];
    float factor[COUNT];
    bool from_param[COUNT];
    for (int k = 0; k < COUNT; k++) {
        out[k] = averages[moves.which[k]] + begin;
        factor[k] = moves.factor[k];
        from_param[k] = moves.from_param[k];
    }
#pragma omp simd
    for (Index i = 0; i < count; i++) {
        const float value = Kind::widened(param[i]);
        for (int k = 0; k < COUNT; k++) {
            const float old = out[k][i];
            out[k][i] = multiply_add(factor[k], value - old, from_param[k] ? value : old);
        }
    }
}

template <class Kind>
void move_any(const typename Kind::Stored* param, float* const* averages, const Moves& moves, Index begin,
              Index count) {
    switch (moves.count) {
        case 1: return move<Kind, 1>(param, averages, moves, begin, count);
        case 2: return move<Kind, 2>(param, averages, moves, begin, count);
        case 3: return move<Kind, 3>(param, averages, moves, begin, count);
        default: return move<Kind, 4>(param, averages, moves, begin, count);
    }
}

inline void widen(const std::uint16_t* __restrict param, float* __restrict room, Index count) {
    Index i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(param + i));
        _mm256_storeu_ps(room + i, _mm256_cvtph_ps(eight));
    }
#endif
    for (; i < count; i++) room[i] = Half::widened(param[i]);
}

// Compilers do not vectorise the widening of float16 inside of a longer loop: it goes first, within the nearest cache.
inline void move_half(const std::uint16_t* param, float* const* averages, const Moves& moves, Index begin,
                      Index count) {
    constexpr Index TILE = 512;
    float room[TILE];
    for (Index done = 0; done < count; done += TILE) {
        const Index length = std::min(TILE, count - done);
        widen(param + done, room, length);
        move_any<Single>(room, averages, moves, begin + done, length);
    }
}

template <class Kind>
bool any_odd(const typename Kind::Stored* param, Index count) {
    std::uint32_t found = 0;
#pragma omp simd reduction(| : found)
    for (Index i = 0; i < count; i++) found |= Kind::odd(param[i]);
    return found != 0;
}

template <class Kind>
const typename Kind::Stored* at(const void* param, Index begin) {
    return static_cast<const typename Kind::Stored*>(param) + begin;
}

// Calls act(tensor, begin, end) for this thread's share of all tensors laid end to end.
template <class Act>
void share(Index count, const Index* starts, Index thread, Index threads, Act act) {
    const Index total = starts[count], line = 16;  // elements of a cache line
    const Index first = total * thread / threads / line * line;
    const Index last = thread + 1 == threads ? total : total * (thread + 1) / threads / line * line;
    Index tensor = std::upper_bound(starts, starts + count + 1, first) - starts - 1;
    for (; tensor < count && starts[tensor] < last; tensor++) {
        const Index begin = std::max(first, starts[tensor]) - starts[tensor];
        const Index end = std::min(last, starts[tensor + 1]) - starts[tensor];
        if (begin < end) act(tensor, begin, end);
    }
}

// Below so many elements a thread more costs more than it gives.
constexpr Index GRAIN = 32768;

template <class Act>
void on_threads(Index count, const Index* starts, int threads, Act act) {
    const Index most = std::max<Index>(1, std::min<Index>(threads, starts[count] / GRAIN));
    if (most == 1) return share(count, starts, 0, 1, act);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(most))
    for (Index thread = 0; thread < most; thread++) share(count, starts, thread, most, act);
}

// Sums that are made in one pass, and the elements of each that the nearest cache holds meanwhile.
constexpr int SUMS = 4;
constexpr Index SUM_TILE = 1024;

// Adds weights[k * stride + row] * values[row][begin + i] to sums[k][i], for some rows one after the other, while a sum is in a
// register. Product and sum are rounded one after the other, which any library can do too: contraction is off.
template <class Kind, int COUNT, int ROWS>
void add(const void* const* values, Index begin, const float* weights, Index stride, float (*__restrict sums)[SUM_TILE],
         Index count) {
    const typename Kind::Stored* __restrict from[ROWS];
    float factor[COUNT][ROWS];
    for (int row = 0; row < ROWS; row++) {
        from[row] = at<Kind>(values[row], begin);
        for (int k = 0; k < COUNT; k++) factor[k][row] = weights[k * stride + row];
    }
#pragma omp simd
    for (Index i = 0; i < count; i++) {
        for (int k = 0; k < COUNT; k++) {
            float sum = sums[k][i];
            for (int row = 0; row < ROWS; row++) sum += factor[k][row] * Kind::widened(from[row][i]);
            sums[k][i] = sum;
        }
    }
}

template <class Kind, int COUNT>
void add_rows(Index rows, const void* const* values, Index begin, const float* weights, Index stride,
              float (*sums)[SUM_TILE], Index count) {
    Index row = 0;
    for (; row + 4 <= rows; row += 4) add<Kind, COUNT, 4>(values + row, begin, weights + row, stride, sums, count);
    for (; row < rows; row++) add<Kind, COUNT, 1>(values + row, begin, weights + row, stride, sums, count);
}

template <class Kind>
void add_any(Index rows, const void* const* values, Index begin, const float* weights, Index stride, Index width,
             float (*sums)[SUM_TILE], Index count) {
    switch (width) {
        case 1: return add_rows<Kind, 1>(rows, values, begin, weights, stride, sums, count);
        case 2: return add_rows<Kind, 2>(rows, values, begin, weights, stride, sums, count);
        case 3: return add_rows<Kind, 3>(rows, values, begin, weights, stride, sums, count);
        default: return add_rows<Kind, 4>(rows, values, begin, weights, stride, sums, count);
    }
}

// Compilers do not vectorise the widening of float16 inside of a longer loop: row by row, it goes first.
void add_half(Index rows, const void* const* values, Index begin, const float* weights, Index stride, Index width,
              float (*sums)[SUM_TILE], Index count) {
    float room[SUM_TILE];
    const void* const widened[1] = {room};
    for (Index row = 0; row < rows; row++) {
        widen(at<Half>(values[row], begin), room, count);
        add_any<Single>(1, widened, 0, weights + row, stride, width, sums, count);
    }
}

// At most SUMS sums, tile by tile, each over all rows in their order.
void sum_tiles(Index rows, const void* const* values, int kind, const float* weights, Index width, float* const* sums,
               bool fresh, Index count) {
    float tile[SUMS][SUM_TILE];
    for (Index begin = 0; begin < count; begin += SUM_TILE) {
        const Index length = std::min(SUM_TILE, count - begin), bytes = length * static_cast<Index>(sizeof(float));
        for (Index k = 0; k < width; k++) {
            // Of all numbers, negative zero alone leaves whatever is added to it as it is.
            if (fresh) std::fill_n(tile[k], length, -0.0f);
            else std::memcpy(tile[k], sums[k] + begin, bytes);
        }
        switch (kind) {
            case 0: add_any<Single>(rows, values, begin, weights, rows, width, tile, length); break;
            case 1: add_any<Brain>(rows, values, begin, weights, rows, width, tile, length); break;
            default: add_half(rows, values, begin, weights, rows, width, tile, length);
        }
        for (Index k = 0; k < width; k++) std::memcpy(sums[k] + begin, tile[k], bytes);
    }
}

}  // namespace

extern "C" {

// Kinds of parameters are numbered as in fused.py: float32, bfloat16, float16, float64.

// Moves averages[tensor * width + k] by weights[k] of the way to params[tensor], for each k below width.
// A weight of 0 leaves an average as it is, whatever the parameters are.
void phema_update(Index count, Index width, const void* const* params, const std::int8_t* kinds, float* const* averages,
                  const Index* starts, const float* weights, int threads) {
    for (Index next = 0; next < width;) {
        Moves moves;
        for (; next < width && moves.count < MOST; next++) {
            if (weights[next] == 0.0f) continue;
            const bool large = weights[next] >= 0.5f;
            moves.which[moves.count] = next;
            moves.factor[moves.count] = large ? weights[next] - 1.0f : weights[next];
            moves.from_param[moves.count++] = large;
        }
        if (moves.count == 0) return;
        on_threads(count, starts, threads, [=](Index tensor, Index begin, Index end) {
            const void* param = params[tensor];
            float* const* own = averages + tensor * width;
            const Index length = end - begin;
            switch (kinds[tensor]) {
                case 0: return move_any<Single>(at<Single>(param, begin), own, moves, begin, length);
                case 1: return move_any<Brain>(at<Brain>(param, begin), own, moves, begin, length);
                case 2: return move_half(at<Half>(param, begin), own, moves, begin, length);
                default: return move_any<Double>(at<Double>(param, begin), own, moves, begin, length);
            }
        });
    }
}

// Whether all parameters, rounded to float32, are finite.
int phema_finite(Index count, const void* const* params, const std::int8_t* kinds, const Index* starts, int threads) {
    int found = 0;
    on_threads(count, starts, threads, [=, &found](Index tensor, Index begin, Index end) {
        const void* param = params[tensor];
        const Index length = end - begin;
        const bool here = kinds[tensor] == 0   ? any_odd<Single>(at<Single>(param, begin), length)
                          : kinds[tensor] == 1 ? any_odd<Brain>(at<Brain>(param, begin), length)
                          : kinds[tensor] == 2 ? any_odd<Half>(at<Half>(param, begin), length)
                                               : any_odd<Double>(at<Double>(param, begin), length);
        if (here) __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
    });
    return !found;
}

// Adds weights[k * rows + row] * values[row][i] to sums[k][i], over the rows in their order; to nothing where fresh.
void phema_sum(Index rows, const void* const* values, int kind, const float* weights, Index width, float* const* sums,
               int fresh, Index count) {
    for (Index k = 0; k < width; k += SUMS) {
        const Index some = std::min<Index>(SUMS, width - k);
        sum_tiles(rows, values, kind, weights + k * rows, some, sums + k, fresh != 0, count);
    }
}

}  // extern "C"
