#include "clipping.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

namespace qat {
namespace {

// Width of a single element, relative to its value: enough for the difference of two primitives to keep its digits.
constexpr double thinnest = 0x1p-20, scale_floor = 0x1p-40;
constexpr int coarse_1d = 48, coarse_2d = 24, rounds = 3, basins = 4, fine = 7;

using Doubles = std::vector<double>;

struct Candidate {
  double low, high, error;  // the bounds of either side as magnitudes
};

// Runs function(i) for [0, n), maybe on several threads.
template <class Function>
void each(ParallelFor parallel, int64_t n, Function function) {
  const auto task = [](int64_t first, int64_t last, void* context) {
    for (int64_t i = first; i < last; ++i) (*static_cast<Function*>(context))(i);
  };
  if (parallel != nullptr) parallel(0, n, 1, task, &function);
  else task(0, n, &function);
}

struct Ladder {
  Doubles bounds;
  double ratio;
};

// Bounds from the widest down in equal ratios; a side that may be given up altogether has 0 as its last one.
Ladder ladder(double tight, double widest, double least, int count) {
  const double bottom = std::min(std::max(tight, least), widest);
  const double ratio = widest > 0 ? std::pow(bottom / std::max(widest, 1e-300), 1.0 / std::max(1, count - 1)) : 1.0;
  Ladder made{Doubles(static_cast<size_t>(count)), ratio};
  for (int i = 0; i < count; ++i) made.bounds[static_cast<size_t>(i)] = widest * std::pow(ratio, i);
  if (tight <= 0) made.bounds.back() = 0.0;
  return made;
}

class Search {
 public:
  Search(const Kernels& kernels, ParallelFor parallel, const int64_t* counts, const ClipTask& task, double low,
         double high)
      : kernels_(kernels), parallel_(parallel), task_(task), low_(low), high_(high) {
    const int64_t half = int64_t{1} << (8 + task.mantissa_bits), finite = half - (int64_t{1} << task.mantissa_bits);
    int64_t used = finite;
    while (used > 1 && counts[used - 1] == 0 && counts[half + used - 1] == 0) --used;
    positive_.assign(counts, counts + used);
    negative_.assign(counts + half, counts + half + used);
    for (double& n : negative_) n *= task.negative_weight;
    edges_.resize(static_cast<size_t>(used + 1));
    for (int64_t bin = 0; bin <= used; ++bin) {
      const uint32_t pattern = static_cast<uint32_t>(bin) << (23 - task.mantissa_bits);
      float edge;
      std::memcpy(&edge, &pattern, sizeof(edge));
      edges_[static_cast<size_t>(bin)] = bin == finite ? 0x1p128 : static_cast<double>(edge);
    }
  }

  // Leaves low and high as they are where nothing is better by the margin.
  void run(double* low, double* high) {
    const bool symmetric = task_.rule.symmetric;
    set_density(grid_of(low_, high_, task_.rule).scale / 2.0);
    const double budget = error(low_, high_);
    double tight_low, tight_high;
    if (symmetric) {
      Doubles both(positive_);
      for (size_t i = 0; i < both.size(); ++i) both[i] += negative_[i];
      tight_low = tight_high = tightest(both, budget);
    } else {
      tight_low = tightest(negative_, budget);
      tight_high = tightest(positive_, budget);
    }
    const double below = std::max(-low_, 0.0), above = std::max(high_, 0.0), widest = std::max(below, above);
    const double tight = symmetric ? tight_high : tight_low + tight_high, levels = steps_of_a_side();
    // where nothing bounds the search, it ends at a range 2^-8 of the whole
    const double narrowest = tight > 0 ? tight : widest * 0x1p-8;
    // a quarter and not half of the smallest step: refinement goes a little beyond the end
    set_density(std::max(narrowest / levels, scale_floor) / 4);
    const double least = narrowest / (4 * levels);
    const Candidate best = symmetric ? search_1d(tight, widest, least)
                                     : search_2d(tight_low, below, tight_high, above, least);
    if (!(best.error < (1.0 - task_.margin) * error(low_, high_))) return;
    *low = std::max(-best.low, low_);
    *high = std::min(best.high, high_);
  }

 private:
  double steps_of_a_side() const {
    const GridRule& rule = task_.rule;
    if (!rule.symmetric) return static_cast<double>(rule.qmax - rule.qmin);
    const int64_t above = rule.qmax - rule.middle, below = rule.middle - rule.qmin;
    return static_cast<double>(above > 0 && below > 0 ? std::min(above, below) : std::max(above, below));
  }

  double error(double low, double high) const {
    const CodeGrid grid = grid_of(low, high, task_.rule);
    return kernels_.clip_error(points_.data(), jumps_.data(), static_cast<int64_t>(points_.size()), grid.scale,
                               static_cast<double>(task_.rule.qmin - grid.zero_point),
                               static_cast<double>(task_.rule.qmax - grid.zero_point)) +
           constant_;
  }

  void evaluate(std::vector<Candidate>& candidates, size_t from) const {
    each(parallel_, static_cast<int64_t>(candidates.size() - from), [&](int64_t i) {
      Candidate& c = candidates[from + static_cast<size_t>(i)];
      c.error = error(-c.low, c.high);
    });
  }

  // Elements smaller than `resolution`, half a step, quantize to zero with every candidate, so they cost their squares.
  void set_density(double resolution) {
    constant_ = 0.0;
    Doubles edges_neg, dense_neg, edges_pos, dense_pos;
    add_side(negative_, -high_, -low_, resolution, edges_neg, dense_neg);
    add_side(positive_, low_, high_, resolution, edges_pos, dense_pos);
    points_.clear();
    for (size_t i = edges_neg.size(); i-- > 0;) points_.push_back(-edges_neg[i]);
    points_.insert(points_.end(), edges_pos.begin(), edges_pos.end());
    Doubles dense{0.0};
    dense.insert(dense.end(), dense_neg.rbegin(), dense_neg.rend());
    dense.push_back(0.0);
    dense.insert(dense.end(), dense_pos.begin(), dense_pos.end());
    dense.push_back(0.0);
    jumps_.resize(points_.size());
    for (size_t i = 0; i < jumps_.size(); ++i) jumps_[i] = dense[i] - dense[i + 1];
  }

  void add_side(const Doubles& side, double inner, double outer, double resolution, Doubles& edges, Doubles& dense) {
    size_t top = side.size() - 1;
    while (top > 0 && side[top] == 0.0) --top;
    const auto above = std::upper_bound(edges_.begin(), edges_.end(), resolution);
    const size_t bottom = std::min(static_cast<size_t>(std::max<int64_t>(above - edges_.begin() - 1, 0)), top);
    for (size_t i = 0; i < bottom; ++i) {
      const double left = edges_[i], right = edges_[i + 1];
      constant_ += side[i] * ((left * left + left * right + right * right) / 3.0);
    }
    for (size_t i = bottom; i <= top + 1; ++i) edges.push_back(std::max(edges_[i], inner));
    // the bins in use end at the smallest and the largest element, and one element is known to be the latter
    double& last_edge = edges.back();
    const double before = edges[edges.size() - 2];
    last_edge = std::min(std::max(outer, before), last_edge);
    const double last = side[top], known = last_edge > before ? std::min(last, 1.0) : last;
    Doubles elements(side.begin() + static_cast<std::ptrdiff_t>(bottom), side.begin() + static_cast<std::ptrdiff_t>(top));
    elements.push_back(last - known);
    elements.push_back(known);
    edges.push_back(edges.back() * (1.0 + thinnest));
    for (size_t i = 0; i < elements.size(); ++i) {
      const double width = edges[i + 1] - edges[i];
      dense.push_back(width > 0 ? elements[i] / std::max(width, 1e-300) : 0.0);
    }
  }

  // The smallest bound whose clipped tail costs no more than the budget.
  double tightest(const Doubles& side, double budget) const {
    double count = 0.0, first = 0.0, second = 0.0;
    size_t beyond = 0;
    for (size_t i = side.size(); i-- > 0;) {
      const double left = edges_[i], middle = (left + edges_[i + 1]) / 2;
      count += side[i];
      first += side[i] * middle;
      second += side[i] * middle * middle;
      beyond += second - 2 * left * first + left * left * count > budget;
    }
    return edges_[beyond];
  }

  // The best candidates first, and around each of them finer ones.
  template <class Around>
  Candidate refine(std::vector<Candidate> candidates, const Around& around) const {
    const auto better = [](const Candidate& a, const Candidate& b) { return a.error < b.error; };
    evaluate(candidates, 0);
    double shrink = 1.0;
    for (int turn = 0; turn < rounds; ++turn, shrink *= 2.0 / (fine - 1)) {
      const size_t kept = std::min<size_t>(basins, candidates.size());
      std::stable_sort(candidates.begin(), candidates.end(), better);
      candidates.resize(kept);
      for (size_t i = 0; i < kept; ++i) around(candidates[i], shrink, candidates);
      evaluate(candidates, kept);
    }
    return *std::min_element(candidates.begin(), candidates.end(), better);
  }

  static double offset(int i) { return -1.0 + 2.0 * i / (fine - 1); }

  Candidate search_1d(double tight, double widest, double least) const {
    const Ladder steps = ladder(tight, widest, least, coarse_1d);
    std::vector<Candidate> candidates;
    for (const double bound : steps.bounds) candidates.push_back({bound, bound, 0.0});
    // a symmetric range of zero width quantizes everything to zero: the ladder's end stays above it
    Candidate& end = candidates.back();
    end.low = end.high = std::max(end.high, least);
    return refine(candidates, [&](Candidate c, double shrink, std::vector<Candidate>& out) {
      for (int i = 0; i < fine; ++i) {
        const double bound = std::min(c.high * std::pow(steps.ratio, offset(i) * shrink), widest);
        out.push_back({bound, bound, 0.0});
      }
    });
  }

  Candidate search_2d(double tight_low, double below, double tight_high, double above, double least) const {
    // a side that does not exist needs no candidates but 0, and the other may have as many as a 1-D search
    const auto count = [](double widest, double other) {
      return widest > 0 ? (other > 0 ? coarse_2d : coarse_1d) : 1;
    };
    const Ladder lows = ladder(tight_low, below, least, count(below, above));
    const Ladder highs = ladder(tight_high, above, least, count(above, below));
    std::vector<Candidate> candidates;
    for (const double low : lows.bounds) {
      for (const double high : highs.bounds) candidates.push_back({low, high, 0.0});
    }
    const bool many_lows = lows.bounds.size() > 1, many_highs = highs.bounds.size() > 1;
    return refine(candidates, [&](Candidate c, double shrink, std::vector<Candidate>& out) {
      for (int i = 0; i < (many_lows ? fine : 1); ++i) {
        const double low = many_lows ? c.low * std::pow(lows.ratio, offset(i) * shrink) : c.low;
        for (int j = 0; j < (many_highs ? fine : 1); ++j) {
          const double high = many_highs ? c.high * std::pow(highs.ratio, offset(j) * shrink) : c.high;
          out.push_back({std::min(low, below), std::min(high, above), 0.0});
        }
      }
    });
  }

  const Kernels& kernels_;
  ParallelFor parallel_;
  const ClipTask& task_;
  double low_, high_;
  Doubles negative_, positive_, edges_;
  Doubles points_, jumps_;
  double constant_ = 0.0;
};

}  // namespace

void clip_ranges(const Kernels& kernels, ParallelFor parallel, const int64_t* counts, int64_t channels,
                 const ClipTask& task, double* low, double* high) {
  const int64_t bins = int64_t{1} << (9 + task.mantissa_bits);
  // threads for the candidates of one channel, or for the channels
  const bool one = channels == 1;
  each(one ? nullptr : parallel, channels, [&](int64_t c) {
    Search(kernels, one ? parallel : nullptr, counts + c * bins, task, low[c], high[c]).run(low + c, high + c);
  });
}

}  // namespace qat
