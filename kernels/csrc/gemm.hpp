// Products of rows with a packed matrix; every output is one chain of sums over the inputs in their order.
//
// The chain of an output is a matter of the matrix alone: neither the number of rows, nor a row's place, nor the number
// of threads, nor any size chosen below changes a bit of it. Partial sums stay in fp32, so a chain may be interrupted.
#pragma once
#include <algorithm>

#include "pool.hpp"

#include "operands.hpp"

namespace braid {

constexpr int PANEL = 64;      // outputs that are computed together: 4 vectors
constexpr int TILE_ROWS = 6;   // rows that are: 24 of the 32 registers hold sums
constexpr int BLOCK_ROWS = 96;  // rows of a chunk: their inputs stay in the L2 cache while all panels pass by
constexpr int SLAB_WORDS = 128;  // 32 KiB of a panel stay in the nearest caches while all rows of a block pass by

// A word is what 32 bits of a row hold: one fp32 input, or two bf16 inputs, which one instruction multiplies and adds.
// A matrix [outputs, inputs] is laid out as panels of 64 outputs, each [words][64]; the last panel is as wide as it has
// to be, in vectors. Padding is 0. Gate and up of an MLP share panels: 32 gate outputs, then their 32 up outputs.
template <class T>
struct Matrix {
    static constexpr int PER_WORD = Operand<T>::PER_DWORD;

    const uint32_t* data;
    int outputs;  // padding not counted
    int inputs;

    int words() const { return (inputs + PER_WORD - 1) / PER_WORD; }
    int panels() const { return (outputs + PANEL - 1) / PANEL; }
    const uint32_t* panel(int index) const { return data + ptrdiff_t(index) * PANEL * words(); }
    int vectors(int panel) const { return std::min((outputs - panel * PANEL + LANES - 1) / LANES, PANEL / LANES); }
    ptrdiff_t size() const { return ptrdiff_t(outputs + LANES - 1) / LANES * LANES * words(); }  // in words
};

// A single tile of rows asks for the weights that it will need in so many bytes: 27 GB/s with one thread of a Zen 4, and
// 15 with 16 KiB. Where there are more tiles, the first ones bring the next slab, so that memory is busy all the time.
constexpr int LOOK_AHEAD = 2048;

// The part of a chain that a slab holds, for up to 6 rows.
struct Slab {
    const uint32_t* weights;
    int first_word, words;  // whole words
    bool has_half;          // one word follows of which only the first input exists
    const char* next;       // what to bring to the L2 cache meanwhile, so many lines each 4 words
    int lines;
};

template <class T, int ROWS, int VECTORS>
[[gnu::noinline]] void multiply_tile(const T* const* rows, const Slab& slab, float* sums) {
    const char* x[ROWS];
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        x[r] = reinterpret_cast<const char*>(rows[r]) + ptrdiff_t(slab.first_word) * 4;
        for (int v = 0; v < VECTORS; ++v)
            sum[r][v] = slab.first_word ? _mm512_load_ps(sums + r * PANEL + v * LANES) : _mm512_setzero_ps();
    }
    const uint32_t* weights = slab.weights;
    const char* next = slab.next;
    const auto step = [&](auto word_of_row) {
        __m512i panel[VECTORS];
        for (int v = 0; v < VECTORS; ++v) panel[v] = _mm512_loadu_si512(weights + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const __m512i word = _mm512_set1_epi32(word_of_row(r));
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = Operand<T>::multiply_add(sum[r][v], word, panel[v]);
        }
        weights += VECTORS * LANES;
    };
    for (ptrdiff_t at = 0; at < ptrdiff_t(slab.words) * 4; at += 4) {
        if (at % 16 == 0)
            for (int line = 0; line < slab.lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        step([&](int r) {
            int word;
            __builtin_memcpy(&word, x[r] + at, 4);
            return word;
        });
    }
    if (slab.has_half) {
        step([&](int r) {
            uint16_t half;
            __builtin_memcpy(&half, x[r] + ptrdiff_t(slab.words) * 4, 2);
            return int(half);
        });
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) _mm512_store_ps(sums + r * PANEL + v * LANES, sum[r][v]);
}

template <class T>
using TileFunction = void (*)(const T* const*, const Slab&, float*);

template <class T>
TileFunction<T> tile_function(int rows, int vectors) {
#define TILES_OF(R) {multiply_tile<T, R, 1>, multiply_tile<T, R, 2>, multiply_tile<T, R, 3>, multiply_tile<T, R, 4>}
    static constexpr TileFunction<T> all[TILE_ROWS][PANEL / LANES] = {TILES_OF(1), TILES_OF(2), TILES_OF(3),
                                                                     TILES_OF(4), TILES_OF(5), TILES_OF(6)};
#undef TILES_OF
    return all[rows - 1][vectors - 1];
}

struct Range {
    int begin, end;
    int size() const { return end - begin; }
};

// The part that has index `part` when 0 .. total is cut into `parts` as equal ones as can be.
inline Range part_of(int total, int parts, int part) {
    return {int(int64_t(total) * part / parts), int(int64_t(total) * (part + 1) / parts)};
}

// sums: [num_rows][64] <- rows (addresses of up to BLOCK_ROWS) times one panel. `end`: of the weights to look ahead to.
template <class T>
void multiply_panel(const T* const* rows, int num_rows, const Matrix<T>& matrix, int panel, const uint32_t* end,
                    float* sums) {
    const int vectors = matrix.vectors(panel), whole_words = matrix.inputs / Matrix<T>::PER_WORD;
    const int tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t* weights = matrix.panel(panel);
    int first = 0;
    do {
        const int words = std::min(whole_words - first, SLAB_WORDS);
        const bool is_last = first + words == whole_words;
        const bool has_half = is_last && matrix.inputs % Matrix<T>::PER_WORD;
        const uint32_t* following = weights + (words + has_half) * vectors * LANES;
        Slab slab{weights, first, words, has_half, reinterpret_cast<const char*>(following), 0};
        if (tiles == 1) slab.next = reinterpret_cast<const char*>(weights) + LOOK_AHEAD;
        const bool has_next = tiles == 1 || following < end;
        for (int tile = 0; tile < tiles; ++tile) {
            const Range range = part_of(num_rows, tiles, tile);
            slab.lines = has_next && tile < 4 * vectors ? (4 * vectors + tiles - 1) / tiles : 0;
            tile_function<T>(range.size(), vectors)(rows + range.begin, slab, sums + range.begin * PANEL);
            slab.next += ptrdiff_t(slab.lines) * ((words + 3) / 4) * 64;
        }
        weights = following;
        first += words;
    } while (first < whole_words);
}

// How a product is shared out: chunks of up to BLOCK_ROWS rows by some panels.
struct Cut {
    int row_blocks, panel_groups;

    // `products`: how many of about this size are shared out together, among so many threads.
    Cut(int64_t rows, int panels, int64_t panel_bytes, int products, int threads) {
        row_blocks = int((rows + BLOCK_ROWS - 1) / BLOCK_ROWS);
        const int others = std::max(row_blocks * products, 1);
        const int wanted = threads == 1 ? 1 : (4 * threads + others - 1) / others;
        // a chunk is worth a claim from a few us on: 32 KiB to read, or 0.5 million multiplications
        const int64_t worth = std::max(panels * panel_bytes / (32 << 10), panels * panel_bytes / 4 * rows >> 19);
        panel_groups = int(std::clamp<int64_t>(std::min<int64_t>(wanted, worth), 1, panels));
    }
    int chunks() const { return row_blocks * panel_groups; }
};

}  // namespace braid
