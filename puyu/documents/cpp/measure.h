// The scores of puyu/data/measure.py, text by text. The names there stand in the order of the enum here.

#pragma once

#include <cmath>
#include <limits>

#include "automaton.h"
#include "units.h"

namespace puyu {

enum Score : int {
    CHARS, PUNCTUATION_SHARE, DIGITS, WHITESPACE, ODD_CHARS, CHAR_RUNS, LOREM_IPSUM,
    LINES, MEAN_LINE, BULLET_LINES, ELLIPSIS_LINES, ENDED_LINES, BOILERPLATE_LINES, DUP_LINES, DUP_LINE_CHARS,
    DUP_PARAGRAPHS, DUP_PARAGRAPH_CHARS,
    TOP_2GRAM, TOP_3GRAM, TOP_4GRAM, DUP_5GRAM, DUP_6GRAM, DUP_7GRAM, DUP_8GRAM, DUP_9GRAM, DUP_10GRAM,
    WORDS, MEAN_WORD, ALPHA_WORDS, SYMBOLS, STOP_WORDS,
    HAN_COUNT, HAN_SHARE, SENTENCE_MARKS,
    LONGEST_LINE, LETTERS,
    NUM_SCORES
};

enum Units_of : uint8_t { BY_WORDS, BY_CHARACTERS, AS_CODE };

inline double share(double part, double whole) { return whole != 0 ? part / whole : 0.0; }

class Measure {
  public:
    Measure(const Unicode &unicode, const Automaton &boilerplate) : unicode(unicode), boilerplate(boilerplate) {}

    void operator()(const uint8_t *bytes, int64_t length, uint8_t how, double *scores) {
        text.read(unicode, bytes, length);
        for (int i = 0; i < NUM_SCORES; i++) scores[i] = std::numeric_limits<double>::quiet_NaN();
        characters(scores);
        if (how == AS_CODE) {
            code(scores);
        } else {
            lines(scores), paragraphs(scores);
            how == BY_WORDS ? split_words(text, units) : split_units(text, units);
            repetition(scores);
            how == BY_WORDS ? words(scores) : han(scores);
        }
        // four places, so that what a rule judges is what a person reads
        for (int i = 0; i < NUM_SCORES; i++) scores[i] = std::floor(scores[i] * 1e4 + 0.5) / 1e4;
    }

  private:
    struct Line {
        int64_t begin, end;  // without blanks at either side
    };

    const Unicode &unicode;
    const Automaton &boilerplate;
    Characters text;
    Units units;
    Table table;
    std::vector<uint32_t> places;
    std::vector<Table::Slot *> slots;
    std::vector<Line> found;
    std::vector<uint8_t> marked;

    uint64_t hash_of(int64_t begin, int64_t end) const {
        return quick_hash(text.bytes + text.at[begin], text.at[end] - text.at[begin]);
    }

    // Whether these words, in lower case, stand there.
    bool starts(int64_t at, const char *ascii) const {
        for (; *ascii; ascii++, at++)
            if (at >= text.size || ascii_lower(text.points[at]) != uint32_t(*ascii)) return false;
        return true;
    }

    void characters(double *scores) {
        int64_t punctuation = 0, digits = 0, blanks = 0, odd = 0, runs = 0, lorem = 0, n = text.size;
        for (int64_t i = 0, begin = 0; i < n; i++) {
            uint8_t kind = text.kinds[i];
            punctuation += kind & PUNCTUATION ? 1 : 0;
            digits += kind & DIGIT ? 1 : 0;
            blanks += kind & SPACE ? 1 : 0;
            odd += kind & ODD ? 1 : 0;
            if (i + 1 == n || text.points[i + 1] != text.points[i]) {
                if (i + 1 - begin >= 20 && !(kind & SPACE)) runs += i + 1 - begin;
                begin = i + 1;
            }
            if (ascii_lower(text.points[i]) == 'l' && starts(i, "lorem ipsum")) lorem++;
        }
        scores[CHARS] = double(n);
        scores[PUNCTUATION_SHARE] = share(punctuation, n), scores[DIGITS] = share(digits, n);
        scores[WHITESPACE] = share(blanks, n), scores[ODD_CHARS] = share(odd, n);
        scores[CHAR_RUNS] = share(runs, n), scores[LOREM_IPSUM] = double(lorem);
    }

    // f(begin, end) of each line.
    template <typename F>
    void each_line(const F &f) const {
        for (int64_t i = 0, begin = 0; i <= text.size; i++)
            if (i == text.size || text.points[i] == '\n') f(begin, i), begin = i + 1;
    }

    static bool is_bullet(uint32_t p) {
        return p == 0x2022 || p == '-' || p == '*' || p == 0x25cf || p == 0xb7 || p == 0x25aa || p == 0x25e6;
    }

    static bool is_end(uint32_t p) {
        switch (p) {
            case '.': case '!': case '?': case '"': case 0x201d: case 0x3002: case 0xff01: case 0xff1f: case 0x2026:
            case 0xff1b: case 0xff1a: case ':': case 0x300d: case 0x300f: case ')': case 0xff09: return true;
        }
        return false;
    }

    void lines(double *scores) {
        found.clear();
        each_line([&](int64_t begin, int64_t end) {
            while (begin < end && text.is(begin, SPACE)) begin++;
            while (begin < end && text.is(end - 1, SPACE)) end--;
            if (begin < end) found.push_back({begin, end});
        });
        table.clear(int64_t(found.size()));
        int64_t total = int64_t(found.size()), all = 0, bullets = 0, ellipses = 0, ended = 0, again = 0, again_chars = 0;
        for (const Line &line : found) {
            int64_t size = line.end - line.begin;
            uint32_t last = text.points[line.end - 1];
            all += size;
            bullets += is_bullet(text.points[line.begin]);
            ended += is_end(last);
            ellipses += last == 0x2026 || (size >= 3 && last == '.' && text.points[line.end - 2] == '.' &&
                                           text.points[line.end - 3] == '.');
            bool letters = false;
            for (int64_t i = line.begin; i < line.end && !letters; i++) letters = text.is(i, ALPHA);
            if (letters && table.add(hash_of(line.begin, line.end), 0).count++) again++, again_chars += size;
        }
        scores[LINES] = double(total), scores[MEAN_LINE] = share(all, total);
        scores[BULLET_LINES] = share(bullets, total), scores[ELLIPSIS_LINES] = share(ellipses, total);
        scores[ENDED_LINES] = total > 2 ? share(ended, total) : 1.0;
        scores[BOILERPLATE_LINES] = share(boilerplate_lines(), total);
        scores[DUP_LINES] = share(again, total), scores[DUP_LINE_CHARS] = share(again_chars, all);
    }

    // Short lines with a phrase in them.
    int64_t boilerplate_lines() {
        marked.assign(found.size(), 0);
        size_t line = 0;
        boilerplate.each(text.bytes, text.at[text.size], [&](int64_t begin, int64_t end, int64_t) {
            while (line < found.size() && text.at[found[line].end] < end) line++;
            if (line < found.size() && text.at[found[line].begin] <= begin) marked[line] = 1;
        });
        int64_t count = 0;
        for (size_t i = 0; i < found.size(); i++) count += marked[i] && found[i].end - found[i].begin <= 200;
        return count;
    }

    // Parts between lines that are empty or blank, as re.split(r"\n\s*\n") gives them.
    void paragraphs(double *scores) {
        found.clear();
        int64_t begin = 0;
        for (int64_t i = 0; i < text.size; i++) {
            if (text.points[i] != '\n') continue;
            int64_t last = -1, j = i + 1;
            for (; j < text.size && text.is(j, SPACE); j++)
                if (text.points[j] == '\n') last = j;
            if (last < 0) continue;
            if (i > begin) found.push_back({begin, i});
            begin = last + 1, i = last;
        }
        if (text.size > begin) found.push_back({begin, text.size});
        table.clear(int64_t(found.size()));
        int64_t again = 0, again_chars = 0;
        for (const Line &part : found)
            if (table.add(hash_of(part.begin, part.end), 0).count++) again++, again_chars += part.end - part.begin;
        scores[DUP_PARAGRAPHS] = share(again, double(found.size()));
        scores[DUP_PARAGRAPH_CHARS] = share(again_chars, text.size);
    }

    // An n-gram can only stand there twice where the shorter ones in it do, so each length looks at what the one before
    // left: few places after the second.
    void repetition(double *scores) {
        int64_t all = 0;
        for (int64_t i = 0; i < units.size; i++) all += units.ends[i] - units.begins[i];
        places.resize(size_t(units.size > 1 ? units.size - 1 : 0));
        for (size_t i = 0; i < places.size(); i++) places[i] = uint32_t(i);
        for (int n = 2; n <= 10; n++) {
            count_grams(n);
            if (n <= 4) scores[TOP_2GRAM + n - 2] = top(n, all);
            else scores[DUP_5GRAM + n - 5] = repeated(n, all);
            keep_repeated(n);
        }
    }

    int64_t size_of(int64_t from, int64_t to) const {
        int64_t size = 0;
        for (int64_t i = from; i < to; i++) size += units.ends[i] - units.begins[i];
        return size;
    }

    // The slot of the n-gram at each place.
    void count_grams(int n) {
        table.clear(int64_t(places.size()));
        slots.resize(places.size());
        for (size_t i = 0; i < places.size(); i++) {
            uint64_t total = 0;
            for (int k = 0; k < n; k++) total = total * PRIME + units.hashes[places[i] + size_t(k)];
            slots[i] = &table.add(mixed(total), places[i]);
            slots[i]->count++;
        }
    }

    // Places where an n + 1-gram may stand that stands twice.
    void keep_repeated(int n) {
        size_t left = 0;
        for (size_t i = 0; i + 1 < places.size(); i++)
            if (slots[i]->count > 1 && places[i + 1] == places[i] + 1 && slots[i + 1]->count > 1 &&
                places[i] + uint32_t(n) < units.size)
                places[left++] = places[i];
        places.resize(left);
    }

    // Characters in the most frequent n-gram, the longest of those that are equally frequent.
    double top(int n, int64_t all) const {
        uint32_t best = 0;
        for (const Table::Slot *slot : slots) best = slot->count > best ? slot->count : best;
        if (best < 2) return 0.0;
        int64_t longest = 0;
        for (size_t i = 0; i < places.size(); i++) {
            if (slots[i]->count != best || slots[i]->first != places[i]) continue;
            int64_t size = size_of(places[i], places[i] + n);
            longest = size > longest ? size : longest;
        }
        return share(double(longest) * best, double(all));
    }

    // Characters inside an n-gram that stood before, each counted once.
    double repeated(int n, int64_t all) const {
        int64_t covered = 0, upto = 0;
        for (size_t i = 0; i < places.size(); i++) {
            if (slots[i]->first == places[i]) continue;
            int64_t begin = places[i], from = begin > upto ? begin : upto;
            covered += size_of(from, begin + n), upto = begin + n;
        }
        return share(double(covered), double(all));
    }

    bool any(int64_t unit, uint8_t kind) const {
        for (int64_t i = units.begins[unit]; i < units.ends[unit]; i++)
            if (text.is(i, kind)) return true;
        return false;
    }

    void words(double *scores) {
        int64_t bare = 0, letters = 0, size = 0, hashes = 0, dots = 0;
        unsigned stop_words = 0;
        for (int64_t u = 0; u < units.size; u++) {
            if (any(u, ALNUM)) bare++, size += units.ends[u] - units.begins[u];
            letters += any(u, ALPHA);
            stop_words |= stop_word(units.begins[u], units.ends[u]);
        }
        for (int64_t i = 0; i < text.size; i++) {
            hashes += text.points[i] == '#';
            dots += text.points[i] == 0x2026;
            if (i + 2 < text.size && text.points[i] == '.' && text.points[i + 1] == '.' && text.points[i + 2] == '.')
                dots++, i += 2;
        }
        scores[WORDS] = double(bare), scores[MEAN_WORD] = share(size, bare);
        scores[ALPHA_WORDS] = share(letters, units.size);
        scores[SYMBOLS] = share(hashes > dots ? hashes : dots, units.size);
        scores[STOP_WORDS] = __builtin_popcount(stop_words);
    }

    static bool is_mark(uint32_t p) {
        switch (p) {
            case '.': case ',': case ';': case ':': case '!': case '?': case '"': case '\'': case '(': case ')': return true;
        }
        return false;
    }

    static constexpr uint32_t spelled(const char *ascii) {
        uint32_t word = 0;
        for (; *ascii; ascii++) word = word << 8 | uint8_t(*ascii);
        return word;
    }

    // A bit for each of Gopher's eight words.
    unsigned stop_word(int64_t begin, int64_t end) const {
        while (begin < end && is_mark(text.points[begin])) begin++;
        while (begin < end && is_mark(text.points[end - 1])) end--;
        if (end - begin < 2 || end - begin > 4) return 0;
        uint32_t word = 0;
        for (int64_t i = begin; i < end; i++) {
            uint32_t letter = ascii_lower(text.points[i]);
            if (letter - 'a' >= 26) return 0;
            word = word << 8 | letter;
        }
        switch (word) {
            case spelled("the"): return 1;
            case spelled("be"): return 2;
            case spelled("to"): return 4;
            case spelled("of"): return 8;
            case spelled("and"): return 16;
            case spelled("that"): return 32;
            case spelled("have"): return 64;
            case spelled("with"): return 128;
        }
        return 0;
    }

    void han(double *scores) {
        int64_t han = 0, blanks = 0, marks = 0;
        for (int64_t i = 0; i < text.size; i++) {
            han += text.is(i, HAN), blanks += text.is(i, SPACE);
            switch (text.points[i]) {
                case 0xff0c: case 0x3002: case 0xff01: case 0xff1f: case 0xff1b: case 0xff1a: case 0x3001: case ',':
                case '.': case '!': case '?': case ';': case ':': marks++;
            }
        }
        scores[HAN_COUNT] = double(han), scores[HAN_SHARE] = share(han, text.size - blanks);
        scores[SENTENCE_MARKS] = share(marks, han);
    }

    void code(double *scores) {
        int64_t count = 0, longest = 0, all = 0, letters = 0;
        each_line([&](int64_t begin, int64_t end) {
            count++, all += end - begin;
            longest = end - begin > longest ? end - begin : longest;
        });
        for (int64_t i = 0; i < text.size; i++) letters += text.is(i, ALPHA);
        scores[LINES] = double(count), scores[MEAN_LINE] = share(all, count);
        scores[LONGEST_LINE] = double(longest), scores[LETTERS] = share(letters, text.size);
    }
};

}  // namespace puyu
