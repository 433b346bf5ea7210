// How much each segment of a text helps to predict its neighbors: the cache of Kuhn and De Mori (1990).

#pragma once

#include "ngram.h"

namespace puyu {

struct SpliceOptions {
    int64_t segment;  // bytes
    int64_t reach;    // segments to either side
    double cache;     // weight of the cache
    double pairs;     // weight of pairs of units within the cache
    double bound;     // bits that one unit can gain, at most
};

class Splice {
  public:
    Splice(const Unicode &unicode, const Model &model, const SpliceOptions &options)
        : unicode(unicode), model(model), options(options) {}

    // Gains [segments, 2 reach + 1] in bits per unit: row j, column reach + i - j is what segment i does for segment j,
    // NaN at itself and beyond the text; starts [segments] in code points. Returns the number of segments.
    int64_t operator()(const uint8_t *bytes, int64_t length, double *gains, int64_t *starts) {
        text.read(unicode, bytes, length);
        read();
        cut(starts);
        int64_t count = int64_t(bounds.size()) - 1, width = 2 * options.reach + 1;
        for (int64_t k = 0; k < count * width; k++) gains[k] = std::nan("");
        singles.assign(size_t(num_singles), 0), pairs.assign(size_t(num_pairs), 0);
        leading.assign(size_t(num_singles) + 1, 0);
        for (int64_t i = 0; i < count; i++) {
            fill(i, 1);
            for (int64_t j = i - options.reach; j <= i + options.reach; j++)
                if (j != i && j >= 0 && j < count) gains[j * width + options.reach + i - j] = gain(i, j);
            fill(i, 0);
        }
        return count;
    }

  private:
    struct Row {
        uint32_t single, before, pair;  // numbers within this text; `before` of the unit before, which the first lacks
        int64_t begin;
        double probability;
    };
    const Unicode &unicode;
    const Model &model;
    const SpliceOptions &options;
    Characters text;
    Table table;
    std::vector<Row> rows;
    std::vector<int64_t> bounds;
    std::vector<uint32_t> singles, leading, pairs;  // of the segment: units, units before others, both
    int64_t num_singles = 0, num_pairs = 0;

    static uint32_t number(Table &table, uint64_t key, int64_t &next) {
        Table::Slot &slot = table.add(key, next);
        if (!slot.count++) next++;
        return slot.first;
    }

    void read() {
        rows.clear(), num_singles = num_pairs = 0;
        Walk walk(model);
        std::vector<uint64_t> hashes;
        each_unit(unicode, text, [&](const Unit &unit) {
            double bits = walk.step(unit, model.vocabulary.id(unit.hash));
            hashes.push_back(unit.hash);
            rows.push_back({0, 0, 0, unit.begin, std::exp2(bits)});
        });
        table.clear(int64_t(rows.size()));
        for (size_t k = 0; k < rows.size(); k++) rows[k].single = number(table, hashes[k], num_singles);
        table.clear(int64_t(rows.size()));
        for (size_t k = 0; k < rows.size(); k++) {
            rows[k].before = k ? rows[k - 1].single : uint32_t(num_singles);
            rows[k].pair = number(table, mixed(uint64_t(rows[k].before) << 32 | rows[k].single), num_pairs);
        }
    }

    // Segments end with the unit that fills them; a last one below half the size belongs to the one before.
    void cut(int64_t *starts) {
        bounds.assign(1, 0);
        int64_t from = 0;
        for (size_t k = 0; k < rows.size(); k++) {
            int64_t at = text.at[rows[k].begin];
            if (at - from >= options.segment) bounds.push_back(int64_t(k)), from = at;
        }
        if (bounds.size() > 1 && 2 * (text.at[text.size] - from) < options.segment) bounds.pop_back();
        for (size_t k = 0; k < bounds.size(); k++) starts[k] = bounds[k] ? rows[size_t(bounds[k])].begin : 0;
        bounds.push_back(int64_t(rows.size()));
    }

    void fill(int64_t segment, uint32_t by) {
        for (int64_t k = bounds[size_t(segment)]; k < bounds[size_t(segment) + 1]; k++) {
            const Row &row = rows[size_t(k)];
            singles[row.single] = by * (singles[row.single] + 1);
            if (k == bounds[size_t(segment)]) continue;
            leading[row.before] = by * (leading[row.before] + 1), pairs[row.pair] = by * (pairs[row.pair] + 1);
        }
    }

    double gain(int64_t from, int64_t to) const {
        double size = double(bounds[size_t(from) + 1] - bounds[size_t(from)]), total = 0;
        double nothing = std::log2(1 - options.cache);
        int64_t first = bounds[size_t(to)], last = bounds[size_t(to) + 1];
        for (int64_t k = first; k < last; k++) {
            const Row &row = rows[size_t(k)];
            if (!singles[row.single]) {
                total += nothing;
                continue;
            }
            double cached = singles[row.single] / size;
            if (uint32_t before = leading[row.before])
                cached += options.pairs * (pairs[row.pair] / double(before) - cached);
            double found = std::log2(1 - options.cache + options.cache * cached / row.probability);
            total += found < options.bound ? found : options.bound;
        }
        return last > first ? total / double(last - first) : 0.0;
    }
};

}  // namespace puyu
