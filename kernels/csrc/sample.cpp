// Draws a token: the winner of a race of scores with Gumbel noise among those that the filters leave; the rules are those of
// model/sampler.py, the noise is that of model/noise.py, in float64.
//
// It draws what those two draw or nothing: where two tokens, or the mass of a nucleus and its edge, are so close that a
// logarithm or a sum rounded otherwise could decide, it says that it is not sure.
#include <algorithm>
#include <cmath>
#include <limits>

#include "arguments.hpp"
#include "workspace.hpp"

#include "vectors.hpp"

namespace braid {
namespace {

constexpr int NOT_SURE = -1;
constexpr double DOUBT = 1e-9;  // far above what roundings add up to
constexpr double LOG_2 = 0.6931471805599453, MOST_NOISE = 36.8;
constexpr double NOTHING = -std::numeric_limits<double>::infinity();
constexpr int DOUBLES = 8, BLOCK = 4;  // of a vector; words of one encrypted counter

struct Draw {
    const float* logits;  // [vocab], finite or -inf
    int vocab, best;      // best: the first of the largest logits
    double temperature, least_score;
    int top_k;  // 0: off
    double top_p;
    uint64_t seed, position;
};

// Philox4x64-10 under the key (seed, STREAM) of the counter (1 + block, position, 0, 0).
class Noise {
  public:
    Noise(uint64_t seed, uint64_t position) : seed_(seed), position_(position) {}

    const uint64_t* block(int number) {
        if (number == number_) return words_;
        number_ = number;
        uint64_t a = 1 + static_cast<uint64_t>(number), b = position_, c = 0, d = 0;
        uint64_t key = seed_, other_key = STREAM;
        for (int round = 0; round < 10; ++round) {
            const unsigned __int128 first = static_cast<unsigned __int128>(a) * 0xD2E7470EE14C6C93;
            const unsigned __int128 second = static_cast<unsigned __int128>(c) * 0xCA5A826395121157;
            a = static_cast<uint64_t>(second >> 64) ^ b ^ key;
            b = static_cast<uint64_t>(second);
            c = static_cast<uint64_t>(first >> 64) ^ d ^ other_key;
            d = static_cast<uint64_t>(first);
            key += 0x9E3779B97F4A7C15, other_key += 0xBB67AE8584CAA73B;
        }
        words_[0] = a, words_[1] = b, words_[2] = c, words_[3] = d;
        return words_;
    }
    uint64_t word(int token) { return block(token / BLOCK)[token % BLOCK]; }

  private:
    static constexpr uint64_t STREAM = 0x62726169645F7631;

    uint64_t seed_, position_, words_[BLOCK];
    int number_ = -1;
};

double gumbel_of(uint64_t word) {
    const double halfway = (static_cast<double>(word >> 11) + 0.5) * 0x1p-53;
    return -std::log(-std::log(std::min(halfway, 1 - 0x1p-53)));
}

class Race {
  public:
    bool may_win(double score) const { return score + MOST_NOISE >= first_ - DOUBT; }

    void enter(int token, double score, uint64_t word) {
        // The noise of 1 - e is below -log e, and a word that begins with n ones tells that e is above 2^-(n + 2).
        const int ones = word == ~uint64_t(0) ? 64 : __builtin_clzll(~word);
        if (score + (ones + 2) * LOG_2 < first_ - DOUBT) return;
        const double reached = score + gumbel_of(word);
        second_ = std::max(second_, std::min(first_, reached));
        if (reached > first_) first_ = reached, winner_ = token;
    }

    int winner() const { return first_ - second_ > DOUBT ? winner_ : NOT_SURE; }

  private:
    double first_ = NOTHING, second_ = NOTHING;
    int winner_ = NOT_SURE;
};

// scores: room for whole vectors; beyond the vocabulary nothing can win.
void score_tokens(const Draw& draw, double* scores) {
    const __m512d best = _mm512_set1_pd(draw.logits[draw.best]), divisor = _mm512_set1_pd(draw.temperature);
    for (int at = 0; at < draw.vocab; at += DOUBLES) {
        const __mmask8 lanes = static_cast<__mmask8>(first_lanes(std::min(draw.vocab - at, DOUBLES)));
        const __m512d raw = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(lanes, draw.logits + at));
        const __m512d score = _mm512_div_pd(_mm512_sub_pd(raw, best), divisor);
        _mm512_storeu_pd(scores + at, _mm512_mask_mov_pd(_mm512_set1_pd(NOTHING), lanes, score));
    }
}

int draw_from_all(const Draw& draw, const double* scores) {
    Noise noise(draw.seed, draw.position);
    Race race;
    race.enter(draw.best, scores[draw.best], noise.word(draw.best));
    for (int begin = 0; begin < draw.vocab; begin += BLOCK) {
        const double* own = scores + begin;
        if (!race.may_win(std::max(std::max(own[0], own[1]), std::max(own[2], own[3])))) continue;
        const uint64_t* words = noise.block(begin / BLOCK);
        for (int lane = 0; lane < BLOCK; ++lane)
            if (begin + lane != draw.best && race.may_win(own[lane])) race.enter(begin + lane, own[lane], words[lane]);
    }
    return race.winner();
}

// The best `top_k` of `count` tokens, of equal ones the lowest; all in ascending order.
int keep_largest(const double* scores, int* tokens, int count, int top_k, double* room) {
    for (int i = 0; i < count; ++i) room[i] = scores[tokens[i]];
    std::nth_element(room, room + top_k - 1, room + count, [](double a, double b) { return a > b; });
    const double edge = room[top_k - 1];
    int at_edge = top_k - static_cast<int>(std::count_if(room, room + count, [=](double it) { return it > edge; }));
    int num_kept = 0;
    for (int i = 0; i < count; ++i) {
        const double score = scores[tokens[i]];
        if (score > edge || (score == edge && at_edge-- > 0)) tokens[num_kept++] = tokens[i];
    }
    return num_kept;
}

double mass_of(const double* scores, const int* tokens, int count, double* room) {
    for (int i = 0; i < count; ++i) room[i] = scores[tokens[i]];
    std::fill(room + count, room + (count + DOUBLES - 1) / DOUBLES * DOUBLES, NOTHING);
    __m512d sum = _mm512_setzero_pd();
    for (int at = 0; at < count; at += DOUBLES) {
        const __m512d score = _mm512_loadu_pd(room + at);
        const __mmask8 counts = _mm512_cmp_pd_mask(score, _mm512_set1_pd(-700.0), _CMP_GT_OQ);
        sum = _mm512_mask_add_pd(sum, counts, sum, exp(score));
    }
    return _mm512_reduce_add_pd(sum);
}

// The fewest best tokens whose mass reaches top_p of all, best first; NOT_SURE where roundings could decide how many.
int keep_nucleus(const double* scores, int* tokens, int count, double top_p, double* room) {
    const double total = mass_of(scores, tokens, count, room), edge = top_p * total;
    // All that are below this have less than the mass that is left out.
    const double least = std::log((1 - top_p) * total / count) - 1e-6;
    int* end = std::partition(tokens, tokens + count, [=](int token) { return scores[token] >= least; });
    std::sort(tokens, end, [=](int a, int b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
    double mass = 0;
    for (int i = 0; tokens + i != end; ++i) {
        mass += std::exp(scores[tokens[i]]);
        if (std::abs(mass - edge) <= DOUBT * total) return NOT_SURE;
        if (mass > edge) return i + 1;
    }
    return NOT_SURE;
}

int draw_filtered(const Draw& draw, const double* scores, int* tokens, double* room) {
    int count = 0;
    for (int token = 0; token < draw.vocab; ++token) {
        tokens[count] = token;
        count += scores[token] > NOTHING && scores[token] >= draw.least_score;
    }
    if (draw.top_k > 0 && draw.top_k < count) count = keep_largest(scores, tokens, count, draw.top_k, room);
    if (draw.top_p < 1) count = keep_nucleus(scores, tokens, count, draw.top_p, room);
    Noise noise(draw.seed, draw.position);
    Race race;
    for (int i = 0; i < count; ++i)
        if (const double score = scores[tokens[i]]; race.may_win(score)) race.enter(tokens[i], score, noise.word(tokens[i]));
    return race.winner();
}

int draw_token(const Draw& draw) {
    thread_local Workspace for_scores, for_tokens, for_room;
    const int padded = draw.vocab + 2 * DOUBLES;
    double* scores = for_scores.room<double>(padded);
    score_tokens(draw, scores);
    if (draw.least_score == NOTHING && draw.top_k == 0 && draw.top_p >= 1) return draw_from_all(draw, scores);
    return draw_filtered(draw, scores, for_tokens.room<int>(padded), for_room.room<double>(padded));
}

PyObject* py_draw(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    Draw draw;
    draw.logits = arguments.pointer<const float>();
    draw.vocab = static_cast<int>(arguments.integer());
    draw.best = static_cast<int>(arguments.integer());
    draw.temperature = arguments.real();
    draw.least_score = arguments.real();
    draw.top_k = static_cast<int>(arguments.integer());
    draw.top_p = arguments.real();
    draw.seed = static_cast<uint64_t>(arguments.integer());
    draw.position = static_cast<uint64_t>(arguments.integer());
    if (!arguments.finish()) return nullptr;
    return PyLong_FromLong(draw_token(draw));  // with the interpreter's lock: giving it away costs more than a draw
}

}  // namespace
}  // namespace braid

extern const PyMethodDef sample_methods[];
const PyMethodDef sample_methods[] = {
    method("draw", braid::py_draw),
    {nullptr, nullptr, 0, nullptr},
};
