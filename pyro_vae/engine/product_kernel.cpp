// c = a b, or a b + bias, of float32 matrices, by vectors of AVX-512. Three ways, by the strides of b:
//   tile    b has contiguous rows: a vector of b by a value of a, into 5 x 4 vectors of c
//   dots    b has contiguous columns, and a few long rows: 4 x 4 values of c, 16 terms of each at a time
//   pack    b has contiguous columns: transposed first, in panels of 64 columns, for `tile`
// An element of c is summed in one order, whatever the number of threads.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

namespace {

using Vector = __m512;
using Int = int64_t;
template <int n> using Constant = std::integral_constant<int, n>;
constexpr Int LANES = 16, ROWS = 5, VECTORS = 4, PANEL = LANES * VECTORS, SIDE = 4;
constexpr Int DEPTH = 128;         // rows of b at a time, so that they stay in the cache
constexpr Int DEEP = 16;           // terms for each row of a, above which it does not pay to transpose b
constexpr Int ALONE = 100 * 1000;  // multiplications that one thread does faster than two

#define UNROLL _Pragma("GCC unroll 16")

__mmask16 first(Int count) { return count >= LANES ? 0xffff : (1u << count) - 1; }

struct Matrix {
  const float* data;
  Int row, column;  // strides
  const float* at(Int i, Int j) const { return data + i * row + j * column; }
  Matrix from(Int i, Int j) const { return {at(i, j), row, column}; }
};

// Store `rows` x C vectors of start + a b, or of a b; the last vector of a row has the elements of `last`.
template <int C>
void tile(Int rows, Int terms, Matrix a, Matrix b, Matrix start, __mmask16 last, float* c, Int c_row) {
  const auto mask = [last](int v) { return v == C - 1 ? last : __mmask16(0xffff); };
  const auto row = [rows](int i) { return std::min<Int>(i, rows - 1); };  // repeated, if there are fewer
  const float* x[ROWS];
  UNROLL for (int i = 0; i < ROWS; ++i) x[i] = a.at(row(i), 0);
  Vector sum[ROWS][C];
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int v = 0; v < C; ++v) {
      sum[i][v] = _mm512_setzero_ps();
      if (start.data) sum[i][v] = _mm512_maskz_loadu_ps(mask(v), start.at(row(i), LANES * v));
    }
  }
  for (Int p = 0; p < terms; ++p) {
    Vector y[C];
    UNROLL for (int v = 0; v < C; ++v) y[v] = _mm512_maskz_loadu_ps(mask(v), b.at(p, LANES * v));
    UNROLL for (int i = 0; i < ROWS; ++i) {
      const Vector value = _mm512_set1_ps(x[i][p * a.column]);
      UNROLL for (int v = 0; v < C; ++v) sum[i][v] = _mm512_fmadd_ps(value, y[v], sum[i][v]);
    }
  }
  UNROLL for (int i = 0; i < ROWS; ++i) {
    UNROLL for (int v = 0; v < C; ++v) {
      _mm512_mask_storeu_ps(c + row(i) * c_row + LANES * v, mask(v), sum[i][v]);
    }
  }
}

void transpose(Vector* x) {  // 16 x 16 values
  Vector y[LANES];
  const auto wide = [](Vector v) { return _mm512_castps_pd(v); };
  UNROLL for (int i = 0; i < LANES; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  UNROLL for (int i = 0; i < LANES; i += 4) {
    UNROLL for (int k = 0; k < 2; ++k) {
      x[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(wide(y[i + k]), wide(y[i + k + 2])));
      x[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(wide(y[i + k]), wide(y[i + k + 2])));
    }
  }
  UNROLL for (int k = 0; k < 4; ++k) {  // block l of x[4 q + k] has column 4 l + k of rows 4 q to 4 q + 3
    const Vector even = _mm512_shuffle_f32x4(x[k], x[k + 4], 0x88);
    const Vector odd = _mm512_shuffle_f32x4(x[k], x[k + 4], 0xdd);
    const Vector even2 = _mm512_shuffle_f32x4(x[k + 8], x[k + 12], 0x88);
    const Vector odd2 = _mm512_shuffle_f32x4(x[k + 8], x[k + 12], 0xdd);
    y[k] = _mm512_shuffle_f32x4(even, even2, 0x88);
    y[k + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    y[k + 8] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    y[k + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
  UNROLL for (int i = 0; i < LANES; ++i) x[i] = y[i];
}

// Store `rows` x `columns` values, at most 4 x 4, of a b, where rows of a and columns of b are contiguous.
void dots(Int rows, Int columns, Int terms, Matrix a, Matrix b, const float* bias, float* c, Int c_row) {
  const float *row[SIDE], *column[SIDE];
  UNROLL for (int i = 0; i < SIDE; ++i) row[i] = a.at(std::min<Int>(i, rows - 1), 0);
  UNROLL for (int j = 0; j < SIDE; ++j) column[j] = b.at(0, std::min<Int>(j, columns - 1));
  Vector sum[LANES];
  UNROLL for (int k = 0; k < LANES; ++k) sum[k] = _mm512_setzero_ps();
  const auto add = [&](Int p, auto load) {
    Vector y[SIDE];
    UNROLL for (int j = 0; j < SIDE; ++j) y[j] = load(column[j] + p);
    UNROLL for (int i = 0; i < SIDE; ++i) {
      const Vector x = load(row[i] + p);
      UNROLL for (int j = 0; j < SIDE; ++j) sum[SIDE * i + j] = _mm512_fmadd_ps(x, y[j], sum[SIDE * i + j]);
    }
  };
  const Int whole = terms / LANES * LANES;
  for (Int p = 0; p < whole; p += LANES) add(p, [](const float* x) { return _mm512_loadu_ps(x); });
  const __mmask16 rest = first(terms - whole);
  if (rest) add(whole, [rest](const float* x) { return _mm512_maskz_loadu_ps(rest, x); });
  // add the lanes of each sum, two sums into one vector at a time
  const auto blocks = [](Vector x, Vector y, auto low, auto high) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, low), _mm512_shuffle_f32x4(x, y, high));
  };
  const auto lanes = [](Vector x, Vector y) {
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  };
  UNROLL for (int k = 0; k < 8; ++k) sum[k] = blocks(sum[k], sum[k + 8], Constant<0x44>(), Constant<0xee>());
  UNROLL for (int k = 0; k < 4; ++k) sum[k] = blocks(sum[k], sum[k + 4], Constant<0x88>(), Constant<0xdd>());
  UNROLL for (int k = 0; k < 2; ++k) sum[k] = lanes(sum[k], sum[k + 2]);
  alignas(64) float value[LANES];  // by blocks of a row each: rows 0, 2, 1, 3
  _mm512_store_ps(value, lanes(sum[0], sum[1]));
  const __mmask8 kept = (1 << columns) - 1;
  const __m128 start = bias ? _mm_maskz_loadu_ps(kept, bias) : _mm_setzero_ps();
  UNROLL for (int i = 0; i < SIDE; ++i) {
    const float* block = value + SIDE * (i == 1 ? 2 : i == 2 ? 1 : i);
    if (i < rows) _mm_mask_storeu_ps(c + i * c_row, kept, _mm_add_ps(_mm_load_ps(block), start));
  }
}

// Copy columns of b, which are contiguous, to `panel`: for each p, up to 64 columns.
void pack(Int columns, Int terms, Matrix b, float* panel) {
  for (Int j = 0; j < columns; j += LANES) {
    for (Int p = 0; p < terms; p += LANES) {
      const __mmask16 rest = first(terms - p);
      Vector x[LANES];
      UNROLL for (int k = 0; k < LANES; ++k) {
        x[k] = j + k < columns ? _mm512_maskz_loadu_ps(rest, b.at(p, j + k)) : _mm512_setzero_ps();
      }
      transpose(x);
      UNROLL for (int k = 0; k < LANES; ++k) {
        if (p + k < terms) _mm512_storeu_ps(panel + (p + k) * PANEL + j, x[k]);
      }
    }
  }
}

struct Product {
  Int rows, terms, columns;
  Matrix a, b;
  const float* bias;
  float* c;
};

struct Share {  // of a thread
  Int thread, threads;
  Int begin(Int count) const { return count * thread / threads; }
  Int end(Int count) const { return count * (thread + 1) / threads; }
};

Int blocks(Int size, Int block) { return (size + block - 1) / block; }

// Columns of b in panels of nearly as many vectors each, at most four.
struct Panels {
  Int columns, vectors = blocks(columns, LANES), count = blocks(vectors, VECTORS);
  Int begin(Int k) const { return LANES * (vectors * k / count); }
  Int width(Int k) const { return std::min(begin(k + 1), columns) - begin(k); }
};

void by_dots(const Product& x, Share share) {
  const Int rows = blocks(x.rows, SIDE), all = rows * blocks(x.columns, SIDE);
  for (Int k = share.begin(all); k < share.end(all); ++k) {
    const Int i = k % rows * SIDE, j = k / rows * SIDE;
    const Int height = std::min(SIDE, x.rows - i), width = std::min(SIDE, x.columns - j);
    const float* bias = x.bias ? x.bias + j : nullptr;
    dots(height, width, x.terms, x.a.from(i, 0), x.b.from(0, j), bias, x.c + i * x.columns + j, x.columns);
  }
}

// By columns of tiles, in each by rows of b, so that what is read of b stays in the cache.
void by_tiles(const Product& x, const float* panels, Share share) {
  const Panels split{x.columns};
  const Int rows = blocks(x.rows, ROWS), all = rows * split.count, end = share.end(all);
  for (Int k = share.begin(all), next; k < end; k = next) {
    next = std::min(end, (k / rows + 1) * rows);
    const Int panel = k / rows, j = split.begin(panel), vectors = blocks(split.width(panel), LANES);
    const __mmask16 last = first(split.width(panel) - (vectors - 1) * LANES);
    const Matrix b = panels ? Matrix{panels + panel * x.terms * PANEL, PANEL, 1} : x.b.from(0, j);
    for (Int p = 0; p == 0 || p < x.terms; p += DEPTH) {
      const Int terms = std::min(DEPTH, x.terms - p);
      for (Int i = k % rows * ROWS; i < (k % rows + next - k) * ROWS; i += ROWS) {
        float* c = x.c + i * x.columns + j;
        const Matrix start = p ? Matrix{c, x.columns, 1} : Matrix{x.bias ? x.bias + j : nullptr, 0, 1};
        const auto run = [&](auto tile) {
          tile(std::min(ROWS, x.rows - i), terms, x.a.from(i, p), b.from(p, 0), start, last, c, x.columns);
        };
        switch (vectors) {
          case 1: run(tile<1>); break;
          case 2: run(tile<2>); break;
          case 3: run(tile<3>); break;
          default: run(tile<4>);
        }
      }
    }
  }
}

void product(const Product& x) {
  static std::vector<float> panels;  // kept, since new memory costs as much as filling it
  const bool has_rows = x.b.column == 1, is_deep = x.terms > DEEP * x.rows && x.a.column == 1;
  const Panels split{x.columns};
  const bool is_packed = !has_rows && !is_deep;
  if (is_packed) panels.resize(std::max<size_t>(panels.size(), split.count * x.terms * PANEL));
  #pragma omp parallel if (x.rows * x.terms * x.columns > ALONE)
  {
    const Share share{omp_get_thread_num(), omp_get_num_threads()};
    if (is_packed) {
      for (Int k = share.begin(split.count); k < share.end(split.count); ++k) {
        pack(split.width(k), x.terms, x.b.from(0, split.begin(k)), panels.data() + k * x.terms * PANEL);
      }
      #pragma omp barrier
    }
    if (!has_rows && is_deep) {
      by_dots(x, share);
    } else {
      by_tiles(x, is_packed ? panels.data() : nullptr, share);
    }
  }
}

float* pointer(PyObject* tensor) {
  PyObject* address = PyObject_CallMethod(tensor, "data_ptr", nullptr);
  void* result = address ? PyLong_AsVoidPtr(address) : nullptr;
  Py_XDECREF(address);
  return static_cast<float*>(result);
}

// product(a, b, [bias,] rows, terms, columns, a's strides, b's strides, out=c): rows or columns of b are
// contiguous, and bias and c are; nothing is checked
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count, PyObject*) {
  Int n[7];
  for (int k = 0; k < 7; ++k) n[k] = PyLong_AsLongLong(arguments[count - 7 + k]);
  const float *a = pointer(arguments[0]), *b = pointer(arguments[1]);
  const float* bias = count > 9 ? pointer(arguments[2]) : nullptr;
  float* c = pointer(arguments[count]);
  if (PyErr_Occurred()) return nullptr;
  try {
    product({n[0], n[1], n[2], {a, n[3], n[4]}, {b, n[5], n[6]}, bias, c});
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  return Py_NewRef(arguments[count]);
}

PyMethodDef methods[] = {
    {"product", (PyCFunction)(void (*)(void))call, METH_FASTCALL | METH_KEYWORDS, nullptr}, {nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "product_kernel", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_product_kernel() { return PyModule_Create(&module); }
