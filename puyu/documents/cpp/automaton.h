// All places of many phrases in one walk over the bytes (Aho and Corasick, 1975), without regard to the case of ASCII.

#pragma once

#include <algorithm>

#include "common.h"

namespace puyu {

class Automaton {
  public:
    // Phrases in UTF-8, none empty.
    explicit Automaton(const Texts &phrases) {
        std::vector<std::vector<Child>> children(1);
        nodes.push_back({});
        for (int64_t i = 0; i < phrases.count; i++) {
            int32_t at = 0;
            for (int64_t k = phrases.starts[i]; k < phrases.starts[i + 1]; k++) {
                uint8_t byte = uint8_t(ascii_lower(phrases.bytes[k]));
                auto &row = children[size_t(at)];
                auto place = std::find_if(row.begin(), row.end(), [&](const Child &c) { return c.byte == byte; });
                if (place != row.end()) {
                    at = place->node;
                    continue;
                }
                int32_t node = int32_t(nodes.size());
                row.push_back({byte, node});  // before `children` grows, which moves its rows
                nodes.push_back({}), children.emplace_back();
                at = node;
            }
            if (nodes[size_t(at)].phrase < 0) nodes[size_t(at)].phrase = int32_t(i);
            lengths.push_back(phrases.starts[i + 1] - phrases.starts[i]);
        }
        link(children);
    }

    // f(begin, end, phrase) of every place, by its end and then from the longest on.
    template <typename F>
    void each(const uint8_t *bytes, int64_t length, const F &f) const {
        auto all = [&](int32_t hit, int64_t end) {
            for (; hit > 0; hit = nodes[size_t(hit)].shorter) {
                int32_t phrase = nodes[size_t(hit)].phrase;
                f(end - lengths[size_t(phrase)], end, int64_t(phrase));
            }
        };
        if (dense.empty()) {
            int32_t at = 0;
            for (int64_t i = 0; i < length; i++) at = next(at, uint8_t(ascii_lower(bytes[i]))), all(hits[size_t(at)], i + 1);
            return;
        }
        const uint32_t *moves = dense.data();
        uint32_t row = 0;
        for (int64_t i = 0; i < length; i++) {
            uint32_t move = moves[row + classes[bytes[i]]];
            row = move >> 1;
            if (move & 1) all(hits[row / uint32_t(num_classes)], i + 1);
        }
    }

  private:
    struct Child {
        uint8_t byte;
        int32_t node;
    };
    struct Node {
        int32_t phrase = -1;   // that ends here
        int32_t fail = 0;      // the longest proper end of this that is a beginning, too
        int32_t shorter = 0;   // the next one along `fail` where a phrase ends; 0: none
        int32_t first = 0, count = 0;
    };
    std::vector<Node> nodes;
    std::vector<uint8_t> bytes_of;
    std::vector<int32_t> node_of;
    std::vector<int64_t> lengths;
    int32_t roots[256] = {};
    std::vector<int32_t> hits;       // of a node: itself where a phrase ends, else the next one where one does, else 0
    uint8_t classes[256] = {};       // bytes that no phrase has are all alike
    int32_t num_classes = 1;
    std::vector<uint32_t> dense;     // [nodes, classes]: twice the row where each byte leads, plus 1 where a phrase ends
    static constexpr size_t MOST_DENSE = 4u << 20;  // entries; beyond that there is no such table

    int32_t child(int32_t at, uint8_t byte) const {
        const Node &node = nodes[size_t(at)];
        for (int32_t i = node.first; i < node.first + node.count; i++)
            if (bytes_of[size_t(i)] == byte) return node_of[size_t(i)];
        return 0;
    }

    int32_t next(int32_t at, uint8_t byte) const {
        for (; at; at = nodes[size_t(at)].fail)
            if (int32_t found = child(at, byte)) return found;
        return roots[byte];
    }

    void link(const std::vector<std::vector<Child>> &children) {
        for (size_t at = 0; at < children.size(); at++) {
            nodes[at].first = int32_t(node_of.size()), nodes[at].count = int32_t(children[at].size());
            for (const Child &c : children[at]) bytes_of.push_back(c.byte), node_of.push_back(c.node);
        }
        for (const Child &c : children[0]) roots[c.byte] = c.node;
        std::vector<int32_t> order{0};  // by depth
        for (size_t i = 0; i < order.size(); i++)
            for (const Child &c : children[size_t(order[i])]) {
                Node &node = nodes[size_t(c.node)];
                if (order[i]) {
                    node.fail = next(nodes[size_t(order[i])].fail, c.byte);
                    node.shorter = nodes[size_t(node.fail)].phrase >= 0 ? node.fail : nodes[size_t(node.fail)].shorter;
                }
                order.push_back(c.node);
            }
        for (size_t at = 0; at < nodes.size(); at++)
            hits.push_back(nodes[at].phrase >= 0 ? int32_t(at) : nodes[at].shorter);
        fill(children, order);
    }

    void fill(const std::vector<std::vector<Child>> &children, const std::vector<int32_t> &order) {
        for (const auto &row : children)
            for (const Child &c : row)
                if (!classes[c.byte]) classes[c.byte] = uint8_t(num_classes++);
        for (int upper = 'A'; upper <= 'Z'; upper++) classes[upper] = classes[upper + 32];
        size_t width = size_t(num_classes);
        if (nodes.size() * width > MOST_DENSE) return;
        dense.assign(nodes.size() * width, 0);
        for (int32_t at : order) {
            uint32_t *row = &dense[size_t(at) * width];
            if (at) std::copy_n(&dense[size_t(nodes[size_t(at)].fail) * width], width, row);
            for (const Child &c : children[size_t(at)])
                row[classes[c.byte]] = uint32_t(size_t(c.node) * width) * 2 + (hits[size_t(c.node)] > 0);
        }
    }
};

}  // namespace puyu
