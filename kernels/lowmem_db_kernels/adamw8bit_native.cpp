// One AdamW step on 8-bit states for a CPU. Every operation is IEEE single, in the order of adamw8bit_eager.py, so that
// weights and states are equal to its bit for bit; compile without contraction. Only the sums are added in another order.
//
// A block of 256 elements passes through arrays on the stack, one short loop after another, so that compilers turn each
// loop into vector instructions.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int BLOCK = 256;
constexpr int64_t CHUNK = 64;  // blocks whose sums are added up first: the order of a sum does not depend on threads
constexpr uint32_t SIGN = 0x80000000u;
constexpr uint32_t INFINITE = 0x7F800000u;
constexpr uint32_t QUIET_NAN = 0x7FC00000u;

enum class Weights : int32_t { fp32, stochastic, extra_bits };

// Laid out as _Arguments in adamw8bit_native.py.
struct Arguments {
    int64_t num_elements;
    void* param;
    int8_t* extra_bits;
    const void* grad;
    void* state1;
    void* state2;
    float* absmax1;
    float* absmax2;
    float lr, c1, root_c2, grad_scale, update_scale;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
    uint32_t key;
    Weights weights;
    int32_t grad_is_bf16, dry_run;
};

struct Sums {
    double grad, update;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline bool is_finite(float x) { return (bits_of(x) & ~SIGN) < INFINITE; }

inline float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

// --- the dynamic 8-bit map, as codec.py ---

template <bool SIGNED>
inline float decode(uint8_t code) {
    const int32_t magnitude = SIGNED ? std::abs(int32_t(code) - 127) : int32_t(code) + 1;
    const uint32_t bits = bits_of(float(magnitude));
    const float level = float_of(bits & INFINITE);
    const uint32_t exponent = (bits >> 23) + 1;
    float scale = (exponent & 1) != 0 ? 5.0f : 1.0f;
    scale *= (exponent & 2) != 0 ? 25.0f : 1.0f;
    scale *= (exponent & 4) != 0 ? 625.0f : 1.0f;
    scale *= SIGNED ? 5e-8f : 5e-9f;
    float value = (18.0f * float(magnitude) - 16.0f * level + 9.0f) * scale;
    value = magnitude == (SIGNED ? 128 : 256) ? 1.0f : value;
    value = magnitude == (SIGNED ? 0 : 1) ? 0.0f : value;
    return SIGNED && code < 127 ? -value : value;
}

template <bool SIGNED>
constexpr float DECADES[6] = {
    float(1e-6 * (1 + 0.9 / (SIGNED ? 1 : 2))),  float(1e-5 * (1 + 0.9 / (SIGNED ? 2 : 4))),
    float(1e-4 * (1 + 0.9 / (SIGNED ? 4 : 8))),  float(1e-3 * (1 + 0.9 / (SIGNED ? 8 : 16))),
    float(1e-2 * (1 + 0.9 / (SIGNED ? 16 : 32))), float(1e-1 * (1 + 0.9 / (SIGNED ? 32 : 64))),
};
template <bool SIGNED>
constexpr float ZERO = float(1e-6 * (0.1 + 0.45 / (SIGNED ? 1 : 2)) / 2);
template <bool SIGNED>
constexpr float ONE = float(1 - 0.225 / (SIGNED ? 64 : 128));

template <bool SIGNED>
inline uint8_t encode(float value) {
    constexpr float FIRST = SIGNED ? 1.0f : 2.0f;
    constexpr const float* T = DECADES<SIGNED>;
    const float size = std::fabs(value);
    float level = FIRST, power = 1e7f;
    level = size >= T[0] ? 2 * FIRST : level, power = size >= T[0] ? 1e6f : power;
    level = size >= T[1] ? 4 * FIRST : level, power = size >= T[1] ? 1e5f : power;
    level = size >= T[2] ? 8 * FIRST : level, power = size >= T[2] ? 1e4f : power;
    level = size >= T[3] ? 16 * FIRST : level, power = size >= T[3] ? 1e3f : power;
    level = size >= T[4] ? 32 * FIRST : level, power = size >= T[4] ? 1e2f : power;
    level = size >= T[5] ? 64 * FIRST : level, power = size >= T[5] ? 1e1f : power;
    const int32_t lowest = int32_t(level);
    int32_t magnitude = int32_t(level * (size * power + 8.0f) * float(1.0 / 9.0));
    magnitude = magnitude < lowest ? lowest : magnitude;
    magnitude = magnitude > 2 * lowest - 1 ? 2 * lowest - 1 : magnitude;
    magnitude = size < ZERO<SIGNED> ? (SIGNED ? 0 : 1) : magnitude;
    magnitude = value >= ONE<SIGNED> ? (SIGNED ? 128 : 256) : magnitude;
    if (SIGNED) return uint8_t(value < 0 ? 127 - magnitude : 127 + magnitude);
    return uint8_t(magnitude - 1);
}

// --- bf16 weights, as rounding.py ---

inline uint32_t mix(uint32_t word) {
    word ^= word >> 16;
    word *= 0x7FEB352Du;
    word ^= word >> 15;
    word *= 0x846CA68Bu;
    return word ^ (word >> 16);
}

inline uint32_t bits_without_payload(float x) { return x != x ? QUIET_NAN : bits_of(x); }

inline uint16_t round_stochastically(float x, uint32_t index, uint32_t key) {
    const uint32_t noise = mix(index ^ key) & 0xFFFFu;
    const uint32_t bits = bits_without_payload(x);
    return uint16_t((is_finite(x) ? bits + noise : bits) >> 16);
}

inline uint32_t round_to_24_bits(float x) { return ((bits_without_payload(x) >> 7) + 1) >> 1; }

// --- one block; `count` is BLOCK for all but the last one ---

template <bool SIGNED>
inline void load_moment(float* moment, const void* state, const float* absmax, int64_t block, int count) {
    if (absmax) {
        const uint8_t* codes = static_cast<const uint8_t*>(state) + block * BLOCK;
        const float scale = absmax[block];
        for (int i = 0; i < count; ++i) moment[i] = decode<SIGNED>(codes[i]) * scale;
    } else {
        std::memcpy(moment, static_cast<const float*>(state) + block * BLOCK, count * sizeof(float));
    }
}

template <bool SIGNED>
inline void store_moment(const float* moment, void* state, float* absmax, int64_t block, int count) {
    if (!absmax) {
        std::memcpy(static_cast<float*>(state) + block * BLOCK, moment, count * sizeof(float));
        return;
    }
    uint8_t* codes = static_cast<uint8_t*>(state) + block * BLOCK;
    int32_t largest = 0;  // the bit patterns of positive floats are ordered as the floats are
    for (int i = 0; i < count; ++i) largest = std::max(largest, int32_t(bits_of(moment[i]) & ~SIGN));
    absmax[block] = float_of(uint32_t(largest));
    const float inverse = 1.0f / std::max(absmax[block], FLT_MIN);
    for (int i = 0; i < count; ++i) codes[i] = encode<SIGNED>(moment[i] * inverse);
}

inline void load_gradient(float* raw, const Arguments& a, int64_t first, int count) {
    if (a.grad_is_bf16) {
        const uint16_t* source = static_cast<const uint16_t*>(a.grad) + first;
        for (int i = 0; i < count; ++i) raw[i] = from_bf16(source[i]);
    } else {
        std::memcpy(raw, static_cast<const float*>(a.grad) + first, count * sizeof(float));
    }
}

inline void load_weight(float* weight, const Arguments& a, int64_t first, int count) {
    if (a.weights == Weights::fp32) {
        std::memcpy(weight, static_cast<const float*>(a.param) + first, count * sizeof(float));
        return;
    }
    const uint16_t* high = static_cast<const uint16_t*>(a.param) + first;
    if (a.weights == Weights::stochastic) {
        for (int i = 0; i < count; ++i) weight[i] = from_bf16(high[i]);
        return;
    }
    const int8_t* low = a.extra_bits + first;
    for (int i = 0; i < count; ++i) weight[i] = float_of((uint32_t(high[i]) << 16) + (uint32_t(int32_t(low[i])) << 8));
}

inline void store_weight(const float* weight, const Arguments& a, int64_t first, int count) {
    if (a.weights == Weights::fp32) {
        std::memcpy(static_cast<float*>(a.param) + first, weight, count * sizeof(float));
        return;
    }
    uint16_t* high = static_cast<uint16_t*>(a.param) + first;
    if (a.weights == Weights::stochastic) {
        for (int i = 0; i < count; ++i) high[i] = round_stochastically(weight[i], uint32_t(first) + uint32_t(i), a.key);
        return;
    }
    int8_t* extra_bits = a.extra_bits + first;
    for (int i = 0; i < count; ++i) high[i] = uint16_t((round_to_24_bits(weight[i]) + 128) >> 8);
    for (int i = 0; i < count; ++i) extra_bits[i] = int8_t(uint8_t(round_to_24_bits(weight[i])));
}

// Of BLOCK numbers, padded with zeros. The lanes are halved one loop after another, which compilers vectorize.
inline double sum_of_squares(const float* x) {
    float sums[BLOCK / 2];
    for (int i = 0; i < BLOCK / 2; ++i) sums[i] = x[i] * x[i] + x[i + BLOCK / 2] * x[i + BLOCK / 2];
    for (int width = BLOCK / 4; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    return sums[0];
}

inline Sums step_block(const Arguments& a, int64_t block, int count) {
    const int64_t first = block * BLOCK;
    const float moment_scale = a.root_c2 / a.c1, scaled_eps = a.eps * a.root_c2;
    alignas(64) float raw[BLOCK], m[BLOCK], v[BLOCK], update[BLOCK], weight[BLOCK];
    alignas(64) int32_t usable[BLOCK];
    if (count < BLOCK) {
        std::memset(raw, 0, sizeof raw);
        std::memset(update, 0, sizeof update);
    }
    load_gradient(raw, a, first, count);
    load_moment<true>(m, a.state1, a.absmax1, block, count);
    load_moment<false>(v, a.state2, a.absmax2, block, count);
    for (int i = 0; i < count; ++i) {
        const float g = raw[i] * a.grad_scale;
        const float new_m = a.beta1 * m[i] + a.one_minus_beta1 * g;
        const float new_v = a.beta2 * v[i] + a.one_minus_beta2 * (g * g);
        usable[i] = is_finite(new_v);  // g^2 is not finite where g is not
        m[i] = usable[i] ? new_m : m[i];
        v[i] = usable[i] ? new_v : v[i];
    }
    int32_t has_usable = 0;
    for (int i = 0; i < count; ++i) has_usable |= usable[i];
    for (int i = 0; i < count; ++i) {
        const float quotient = m[i] * moment_scale / (std::sqrt(v[i]) + scaled_eps);
        update[i] = usable[i] ? quotient : 0.0f;
    }
    const Sums sums = {sum_of_squares(raw), sum_of_squares(update)};
    if (a.dry_run || !has_usable) return sums;  // a block that nothing has changed keeps its codes

    load_weight(weight, a, first, count);
    for (int i = 0; i < count; ++i) {
        const float moved = weight[i] - a.lr * (update[i] * a.update_scale + a.weight_decay * weight[i]);
        weight[i] = usable[i] ? moved : weight[i];
    }
    store_weight(weight, a, first, count);
    store_moment<true>(m, a.state1, a.absmax1, block, count);
    store_moment<false>(v, a.state2, a.absmax2, block, count);
    return sums;
}

inline Sums operator+(Sums x, Sums y) { return {x.grad + y.grad, x.update + y.update}; }

void step_chunks(const Arguments& a, int64_t begin, int64_t end, Sums* sums) {
    const int64_t num_whole_blocks = a.num_elements / BLOCK;
    const int rest = int(a.num_elements % BLOCK);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t last = std::min((chunk + 1) * CHUNK, num_whole_blocks);
        Sums total = {0, 0};
        for (int64_t block = chunk * CHUNK; block < last; ++block) total = total + step_block(a, block, BLOCK);
        if (rest && num_whole_blocks / CHUNK == chunk) total = total + step_block(a, num_whole_blocks, rest);
        sums[chunk] = total;
    }
}

}  // namespace

// Step, and write the sums of squares of gradient and update.
extern "C" void adamw8bit_step(const Arguments* arguments, int num_threads, float* sums) {
    const Arguments& a = *arguments;
    const int64_t num_chunks = (a.num_elements + CHUNK * BLOCK - 1) / (CHUNK * BLOCK);
    const int64_t num_workers = std::max<int64_t>(std::min<int64_t>(num_threads, num_chunks), 1);
    std::vector<Sums> partial(num_chunks);
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < num_workers; ++i) {
        const int64_t begin = num_chunks * i / num_workers, end = num_chunks * (i + 1) / num_workers;
        try {
            threads.emplace_back(step_chunks, std::cref(a), begin, end, partial.data());
        } catch (const std::system_error&) {  // the system gives no more threads
            step_chunks(a, begin, end, partial.data());
        }
    }
    step_chunks(a, 0, num_chunks / num_workers, partial.data());
    for (std::thread& thread : threads) thread.join();
    Sums total = {0, 0};
    for (const Sums& part : partial) total = total + part;
    sums[0] = float(total.grad);
    sums[1] = float(total.update);
}
