// The functions that Python calls. Built once for each instruction set; `library.py` loads the best that runs here.
#pragma once
#include <Python.h>

#include "model.h"

#define FERRY_API extern "C" __attribute__((visibility("default")))

using namespace ferry;

FERRY_API int64_t ferry_layout() { return 1; }

// Return null where there is no memory or no thread to be had: nothing is thrown across this border.
FERRY_API void* ferry_open(int64_t num_threads) {
    try {
        return new Workspace((int)num_threads);
    } catch (...) {
        return nullptr;
    }
}

FERRY_API void ferry_close(void* workspace) { delete (Workspace*)workspace; }

// Return 0, or 1 where memory ran out.
FERRY_API int64_t ferry_forward(void* workspace, const Model* model, const Batch* batch) {
    try {
        forward(*(Workspace*)workspace, *model, *batch);
        return 0;
    } catch (...) {
        return 1;
    }
}

// A product by itself: rows [m, K] in, [m, N] out. For tests.
FERRY_API int64_t ferry_linear(void* workspace, const Linear* l, const float* x, int64_t m, float* out) {
    try {
        linear(*(Workspace*)workspace, *l, m, nullptr, out, false, AsItIs{x, (long)l->cols});
        return 0;
    } catch (...) {
        return 1;
    }
}

// Pack rows [N, K] of items of 4, 2 or 1 bytes; `first` is the row of the whole weight at which they begin. What is
// padding must be zero beforehand.
FERRY_API void ferry_pack(const void* from, void* to, int64_t rows, int64_t cols, int64_t item_bytes, int64_t first) {
    for (int64_t n = 0; n < rows; n++) {
        const int64_t panel = (first + n) / PANEL, lane = (first + n) % PANEL;
        if (item_bytes == 1) {
            int8_t* out = (int8_t*)to + panel * pairs(cols) * 2 * PANEL + lane * 2;
            const int8_t* row = (const int8_t*)from + n * cols;
            for (int64_t k = 0; k < cols; k++) out[k / 2 * 2 * PANEL + k % 2] = row[k];
        } else if (item_bytes == 2) {
            uint16_t* out = (uint16_t*)to + panel * cols * PANEL + lane;
            const uint16_t* row = (const uint16_t*)from + n * cols;
            for (int64_t k = 0; k < cols; k++) out[k * PANEL] = row[k];
        } else {
            uint32_t* out = (uint32_t*)to + panel * cols * PANEL + lane;
            const uint32_t* row = (const uint32_t*)from + n * cols;
            for (int64_t k = 0; k < cols; k++) out[k * PANEL] = row[k];
        }
    }
}

// Round rows [N, K] to 8 bits with a scale each, as `core.quantized.quantize` does without clips.
FERRY_API int64_t ferry_round(const float* from, int64_t rows, int64_t cols, int8_t* to, float* scales) {
    try {
        std::vector<int16_t> row(pairs(cols) * 2);
        for (int64_t n = 0; n < rows; n++) {
            scales[n] = round_row(from + n * cols, cols, row.data());
            for (int64_t k = 0; k < cols; k++) to[n * cols + k] = (int8_t)row[k];
        }
        return 0;
    } catch (...) {
        return 1;
    }
}

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, FERRY_NAME, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC FERRY_INIT(void) { return PyModule_Create(&definition); }
