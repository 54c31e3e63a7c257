// The gate's choice: scores, the best groups, the best experts of them, their weights; rules and ties as in
// router/gate.py.
//
// Scores come from an exponential that is exact to the last fp32 bit, nearly always: so this and any other good one
// order experts alike. A NaN ranks above all numbers.
#include <algorithm>
#include <cmath>
#include <limits>

#include "arguments.hpp"
#include "pool.hpp"

#include "vectors.hpp"

namespace braid {
namespace {

constexpr int CHUNK_ROWS = 16;
constexpr int MAX_EXPERTS = 4096;
constexpr int TAKEN = std::numeric_limits<int>::min();  // ranks below every number

enum class Scoring { sigmoid, softmax };
enum class Method { greedy, best_in_group, top_two_in_group };

struct Gate {
    const float* logits;  // [rows, experts]
    ptrdiff_t stride;
    const float* bias;  // [experts] or null
    Scoring scoring;
    Method method;
    int rows, experts, top_k, groups, top_groups;
    bool normalise;
    float scale;
    int64_t* chosen;  // [rows, top_k]
    float* weights;   // [rows, top_k]
};

inline __m512 exact_exp(__m512 x) {
    const __m256 low = _mm512_castps512_ps256(x), high = _mm512_extractf32x8_ps(x, 1);
    const __m256 exp_low = _mm512_cvtpd_ps(exp(_mm512_cvtps_pd(low)));
    const __m256 exp_high = _mm512_cvtpd_ps(exp(_mm512_cvtps_pd(high)));
    return _mm512_insertf32x8(_mm512_castps256_ps512(exp_low), exp_high, 1);
}

void score_experts(const Gate& gate, const float* logits, float* scores) {
    const __m512 one = _mm512_set1_ps(1.0f);
    if (gate.scoring == Scoring::sigmoid) {
        for (int at = 0; at < gate.experts; at += LANES) {
            const __mmask16 lanes = first_lanes(gate.experts - at);
            const __m512 decay = exact_exp(_mm512_sub_ps(_mm512_setzero_ps(), load(logits + at, lanes)));
            store(scores + at, _mm512_div_ps(one, _mm512_add_ps(one, decay)), lanes);
        }
        return;
    }
    const float highest = *std::max_element(logits, logits + gate.experts);
    __m512 total = _mm512_setzero_ps();
    for (int at = 0; at < gate.experts; at += LANES) {
        const __mmask16 lanes = first_lanes(gate.experts - at);
        const __m512 score = exact_exp(_mm512_sub_ps(load(logits + at, lanes), _mm512_set1_ps(highest)));
        store(scores + at, score, lanes);
        total = _mm512_mask_add_ps(total, lanes, total, score);
    }
    const __m512 divisor = _mm512_set1_ps(_mm512_reduce_add_ps(total));
    for (int at = 0; at < gate.experts; at += LANES) {
        const __mmask16 lanes = first_lanes(gate.experts - at);
        store(scores + at, _mm512_div_ps(load(scores + at, lanes), divisor), lanes);
    }
}

// Integers that compare as the floats do; 0 and -0 are the same, NaN is above infinity.
inline __m512i ranks_of(__m512 value) {
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(value, _mm512_setzero_ps()));
    const __m512i below_zero = _mm512_srai_epi32(bits, 31);
    const __m512i rank = _mm512_xor_si512(bits, _mm512_and_si512(below_zero, _mm512_set1_epi32(0x7fffffff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rank, is_nan, _mm512_set1_epi32(0x7fffffff));
}

inline float value_of(int rank) {
    const int bits = rank < 0 ? rank ^ 0x7fffffff : rank;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// Takes the highest rank of [begin, end), the first of equal ones, and returns its place.
int take_highest(int* ranks, int begin, int end) {
    __m512i highest = _mm512_set1_epi32(TAKEN);
    for (int at = begin; at < end; at += LANES) {
        const __m512i some = _mm512_mask_loadu_epi32(highest, first_lanes(end - at), ranks + at);
        highest = _mm512_max_epi32(highest, some);
    }
    const __m512i wanted = _mm512_set1_epi32(_mm512_reduce_max_epi32(highest));
    for (int at = begin;; at += LANES) {
        const __mmask16 lanes = first_lanes(end - at);
        const __mmask16 found =
            _mm512_mask_cmpeq_epi32_mask(lanes, _mm512_maskz_loadu_epi32(lanes, ranks + at), wanted);
        if (!found) continue;
        const int place = at + __builtin_ctz(found);
        ranks[place] = TAKEN;
        return place;
    }
}

// Lets only the experts of the best groups keep their ranks; the others rank as -inf does.
void keep_best_groups(const Gate& gate, int* ranks) {
    alignas(64) float group_scores[MAX_EXPERTS + LANES];
    alignas(64) int group_ranks[MAX_EXPERTS + LANES];
    const int size = gate.experts / gate.groups;
    for (int group = 0; group < gate.groups; ++group) {
        const int begin = group * size;
        const auto highest = [&] { return *std::max_element(ranks + begin, ranks + begin + size); };
        const int best = highest();
        group_scores[group] = value_of(best);
        if (gate.method == Method::top_two_in_group && size > 1) {
            const int place = take_highest(ranks, begin, begin + size);
            group_scores[group] += value_of(highest());
            ranks[place] = best;
        }
    }
    for (int at = 0; at < gate.groups; at += LANES)
        _mm512_storeu_si512(group_ranks + at, ranks_of(load(group_scores + at, first_lanes(gate.groups - at))));
    bool is_kept[MAX_EXPERTS] = {};
    for (int i = 0; i < gate.top_groups; ++i) is_kept[take_highest(group_ranks, 0, gate.groups)] = true;
    const int lowest = _mm512_cvtsi512_si32(ranks_of(_mm512_set1_ps(-std::numeric_limits<float>::infinity())));
    for (int expert = 0; expert < gate.experts; ++expert)
        if (!is_kept[expert / size]) ranks[expert] = lowest;
}

void route_row(const Gate& gate, int row) {
    alignas(64) float scores[MAX_EXPERTS];
    alignas(64) int ranks[MAX_EXPERTS + LANES];
    score_experts(gate, gate.logits + row * gate.stride, scores);
    for (int at = 0; at < gate.experts; at += LANES) {
        const __mmask16 lanes = first_lanes(gate.experts - at);
        __m512 choice = load(scores + at, lanes);
        if (gate.bias) choice = _mm512_add_ps(choice, load(gate.bias + at, lanes));
        _mm512_storeu_si512(ranks + at, ranks_of(choice));
    }
    if (gate.method != Method::greedy) keep_best_groups(gate, ranks);
    float total = 0;
    for (int slot = 0; slot < gate.top_k; ++slot) {
        const int expert = take_highest(ranks, 0, gate.experts);
        const float score = scores[expert];
        gate.chosen[row * gate.top_k + slot] = expert;
        gate.weights[row * gate.top_k + slot] = score;
        total = slot ? total + score : score;
    }
    for (int slot = 0; slot < gate.top_k; ++slot) {
        float& weight = gate.weights[row * gate.top_k + slot];
        if (gate.normalise) weight /= total + 1e-20f;
        weight *= gate.scale;
    }
}

PyObject* py_route(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    Gate gate;
    gate.logits = arguments.pointer<const float>();
    gate.stride = arguments.integer();
    gate.bias = arguments.pointer<const float>();
    gate.scoring = arguments.integer() ? Scoring::softmax : Scoring::sigmoid;
    gate.method = static_cast<Method>(arguments.integer());
    gate.rows = static_cast<int>(arguments.integer());
    gate.experts = static_cast<int>(arguments.integer());
    gate.top_k = static_cast<int>(arguments.integer());
    gate.groups = static_cast<int>(arguments.integer());
    gate.top_groups = static_cast<int>(arguments.integer());
    gate.normalise = arguments.integer() != 0;
    gate.scale = static_cast<float>(arguments.real());
    gate.chosen = arguments.pointer<int64_t>();
    gate.weights = arguments.pointer<float>();
    if (!arguments.finish()) return nullptr;
    if (gate.experts > MAX_EXPERTS) {
        PyErr_Format(PyExc_ValueError, "%d experts are more than %d: raise MAX_EXPERTS in gate.cpp", gate.experts,
                     MAX_EXPERTS);
        return nullptr;
    }
    {
        WithoutGil without_gil;
        parallel_for((gate.rows + CHUNK_ROWS - 1) / CHUNK_ROWS, [&](int chunk) {
            const int end = std::min((chunk + 1) * CHUNK_ROWS, gate.rows);
            for (int row = chunk * CHUNK_ROWS; row < end; ++row) route_row(gate, row);
        });
    }
    Py_RETURN_NONE;
}

}  // namespace
}  // namespace braid

extern const PyMethodDef gate_methods[];
const PyMethodDef gate_methods[] = {
    method("route", braid::py_route),
    {nullptr, nullptr, 0, nullptr},
};
