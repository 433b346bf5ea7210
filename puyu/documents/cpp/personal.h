// Whether a text can hold personal data at all: what every pattern of puyu/data/pii.py needs, in one walk.

#pragma once

#include "common.h"

namespace puyu {

enum Personal : uint8_t { MAY_EMAIL = 1, MAY_ID_NUMBER = 2, MAY_CARD = 4, MAY_PHONE = 8, MAY_IPV4 = 16, MAY_IPV6 = 32 };

inline bool is_hex(uint32_t p) { return p - '0' < 10 || ascii_lower(p) - 'a' < 6; }

// A digit is what Python's \d is.
inline uint8_t may_hold(const Characters &text) {
    uint8_t found = 0;
    int64_t run = 0;             // digits in a row
    int64_t loose = 0;           // digits in a stretch of digits, blanks, hyphens and brackets
    int64_t plus = -1;           // digits since a plus sign in such a stretch; -1: none
    int64_t dots = 0;            // dots between digits
    int64_t colons = 0;          // colons among hexadecimal digits
    for (int64_t i = 0; i < text.size; i++) {
        uint32_t p = text.points[i];
        bool digit = text.is(i, DIGIT);
        if (p == '@') found |= MAY_EMAIL;
        if (digit) {
            run++, loose++;
            if (plus >= 0 && ++plus >= 6) found |= MAY_PHONE;
            if (run >= 17) found |= MAY_ID_NUMBER;
            if (loose >= 13) found |= MAY_CARD;
            if (loose >= 10) found |= MAY_PHONE;
        } else {
            run = 0;
            if (p == '+') plus = 0, loose = 0;
            else if (p != ' ' && p != '-' && p != '(' && p != ')') loose = 0, plus = -1;
        }
        if (p == '.' && i > 0 && text.is(i - 1, DIGIT)) {
            if (++dots >= 3) found |= MAY_IPV4;
        } else if (!digit) {
            dots = 0;
        }
        if (p == ':') {
            if (++colons >= 3) found |= MAY_IPV6;
        } else if (!is_hex(p)) {
            colons = 0;
        }
    }
    return found;
}

}  // namespace puyu
