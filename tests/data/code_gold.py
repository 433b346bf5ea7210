"""Small repositories with their import edges, listed by hand: the gold of the dependency order.

A repository is one text: a line `=== path` begins a file. The edges follow as `user <- dependency dependency ...`;
a line that begins with `later` has the edges that are needed only later (inside functions, for types, by the package's
own files): they are to be found, and satisfied unless they close a cycle; `broken` lists edges that a cycle costs.
"""

from dataclasses import dataclass, field

from puyu.data.code.tree import SourceFile, Tree
from puyu.documents.programming import language_of


@dataclass(frozen=True)
class Gold:
    name: str
    language: str
    tree: Tree
    edges: frozenset[tuple[str, str]]
    later: frozenset[tuple[str, str]] = frozenset()
    broken: frozenset[tuple[str, str]] = field(default_factory=frozenset)


def parse_files(text):
    files = {}
    for block in text.split("=== ")[1:]:
        path, _, body = block.partition("\n")
        files[path.strip()] = body
    return files


def tree_of(name, files):
    return Tree(name, [SourceFile(path, text, language_of(path, text).name) for path, text in files.items()])


def gold(name, language, text, edges):
    groups = {"": set(), "later": set(), "broken": set()}
    for line in filter(None, map(str.strip, edges.splitlines())):
        first, _, rest = line.partition(" ")
        group, pairs = (first, rest) if first in ("later", "broken") else ("", line)
        user, _, dependencies = pairs.partition(" <- ")
        groups[group] |= {(user.strip(), dependency) for dependency in dependencies.split()}
    tree = tree_of(name, parse_files(text))
    return Gold(name, language, tree, *(frozenset(groups[key]) for key in ("", "later", "broken")))


PYTHON = [
    gold("shop", "python", '''
=== README.md
A shop.
=== setup.py
from setuptools import setup
=== shop/__init__.py
"""A shop.

import shop.nothing
"""
from .cart import Cart as Cart
from .prices import *  # from .orders import x
from . import tax
__version__ = "1"
=== shop/cart.py
from __future__ import annotations
import typing as t, os
from .items import (
    Item,  # one
    Kind as K,
)
if t.TYPE_CHECKING:
    from .orders import Order
def total(cart):
    from shop.tax import rate
    return rate
=== shop/items.py
import dataclasses
class Item: ...
class Kind: ...
=== shop/prices.py
from .items import Item; from . import tax as rates
def price(item): return 1
=== shop/tax.py
text = "from .orders import Order"
=== shop/orders.py
from shop import Cart, price, __version__
from \\
    .items import Item
=== shop/_speed.pyi
def fast() -> int: ...
=== tests/test_shop.py
import shop.orders as o, json
from helpers import make
=== tests/helpers.py
from shop import Cart
def make(): ...
''', """
    shop/__init__.py <- shop/cart.py shop/prices.py shop/tax.py
    shop/cart.py <- shop/items.py
    later shop/cart.py <- shop/orders.py shop/tax.py
    shop/prices.py <- shop/items.py shop/tax.py
    shop/orders.py <- shop/cart.py shop/prices.py shop/__init__.py shop/items.py
    tests/test_shop.py <- shop/orders.py tests/helpers.py
    tests/helpers.py <- shop/cart.py
    later tests/helpers.py <- shop/__init__.py
    broken shop/cart.py <- shop/orders.py
    """),
    gold("tools", "python", '''
=== src/tools/__init__.py
=== src/tools/text/__init__.py
from tools.text.split import split_words
from .join import *
=== src/tools/text/split.py
import re
import string
def split_words(): ...
=== src/tools/text/join.py
from ..core import base
def join_words(): ...
=== src/tools/core/__init__.py
=== src/tools/core/base.py
import types, random
=== src/tools/types.py
from .text import split_words, join_words
=== src/tools/cli.py
import tools.text, tools.types
from ....above import nothing
try:
    import tools.core.base as b
except ImportError:
    b = None
=== examples/run.py
from tools.cli import main
import common
=== examples/common.py
x = 1
=== other/common.py
x = 2
''', """
    src/tools/text/__init__.py <- src/tools/text/split.py src/tools/text/join.py
    src/tools/text/join.py <- src/tools/core/base.py
    src/tools/types.py <- src/tools/text/split.py src/tools/text/join.py
    later src/tools/types.py <- src/tools/text/__init__.py
    src/tools/cli.py <- src/tools/text/__init__.py src/tools/types.py src/tools/core/base.py
    examples/run.py <- src/tools/cli.py examples/common.py
    """),
    gold("knot", "python", '''
=== a.py
import b
=== b.py
import c
=== c.py
import a
import d
=== d.py
x = """
import a
"""
=== e.py
import a
''', """
    a.py <- b.py
    b.py <- c.py
    c.py <- a.py d.py
    e.py <- a.py
    broken c.py <- a.py
    """),
]  # fmt: skip

JAVASCRIPT = [
    gold("web", "javascript", r'''
=== package.json
{"name": "web", "main": "src/index.js", "imports": {"#store/*": "./src/store/*.js"}}
=== src/index.js
import App from './app';
export * from './lib/index.js';
import './style.css';
import React from 'react';
=== src/app.js
import { format, parse as p } from "./lib";
import * as api from './api'
import data from './data.json';
import state from '#store/state';
const page = () => import('./page');
=== src/lib/index.js
export { format } from './format';
export * from './parse';
=== src/lib/format.js
// import x from '../page'
const pattern = /['"]/g, also = `import x from '../page'`;
export function format(x) { return x.replace(/"/g, "'") }
=== src/lib/parse.js
import { format } from './format'
export const parse = 1;
=== src/api.js
import fs from 'fs';
import { get } from '@/net/http';
export default get;
=== src/net/http.js
export const get = 1;
=== src/page.js
import App from './app';
/* import x from './index' */
=== src/data.json
{}
=== src/store/state.js
export default {};
''', """
    src/index.js <- src/app.js src/lib/index.js
    src/app.js <- src/lib/format.js src/lib/parse.js src/api.js src/data.json src/store/state.js
    later src/app.js <- src/lib/index.js src/page.js
    src/lib/index.js <- src/lib/format.js src/lib/parse.js
    src/lib/parse.js <- src/lib/format.js
    src/api.js <- src/net/http.js
    src/page.js <- src/app.js
    broken src/app.js <- src/page.js
    """),
    gold("server", "javascript", r'''
=== package.json
{"name": "server", "main": "lib"}
=== bin/run
#!/usr/bin/env node
require('..')
=== lib/index.js
'use strict'
const { Router } = require('./router'), path = require('node:path')
module.exports = require("./server.cjs")
=== lib/router.js
const util = require('./util')
function lazy() { return require('./server.cjs') }
=== lib/server.cjs
var r = require('./router.js')
var package_ = require('../package.json');
=== lib/util/index.js
exports.x = 'require("./y")'
''', """
    bin/run <- lib/index.js
    lib/index.js <- lib/router.js lib/server.cjs
    lib/router.js <- lib/util/index.js
    later lib/router.js <- lib/server.cjs
    lib/server.cjs <- lib/router.js package.json
    broken lib/router.js <- lib/server.cjs
    """),
    gold("mono", "javascript", r'''
=== package.json
{"name": "mono", "workspaces": ["packages/*"]}
=== packages/core/package.json
{"name": "@mono/core", "exports": {".": {"import": "./dist/index.mjs"}, "./deep/*": "./src/deep/*.mjs"}}
=== packages/core/src/index.mjs
export const one = 1
=== packages/core/src/deep/two.mjs
export const two = 2
=== packages/ui/package.json
{"name": "@mono/ui", "main": "button"}
=== packages/ui/button.jsx
import { one } from '@mono/core'
import { two } from '@mono/core/deep/two'
import missing from './missing'
=== packages/app/main.js
import Button from '@mono/ui';
import 'lodash/fp';
''', """
    packages/ui/button.jsx <- packages/core/src/index.mjs packages/core/src/deep/two.mjs
    packages/app/main.js <- packages/ui/button.jsx
    """),
]  # fmt: skip

TYPESCRIPT = [
    gold("editor", "typescript", r'''
=== src/main.ts
import { Editor, type Options } from "./editor/index.js";
import type { Theme } from './theme';
import config = require("./config");
=== src/config.ts
export = { a: 1 };
=== src/theme.ts
export interface Theme { kind: 'dark' | 'light' }
=== src/editor/index.ts
export { Editor } from "./editor";
export type { Options } from "./options";
=== src/editor/editor.tsx
import { Options } from './options'
import type { Theme } from "../theme";
import { Keys } from "src/editor/keys";
export class Editor {}
=== src/editor/keys.ts
export enum Keys { A = 'a' }
=== src/editor/options.ts
export interface Options { from: string }
''', """
    src/main.ts <- src/editor/editor.tsx src/editor/options.ts src/config.ts
    later src/main.ts <- src/editor/index.ts src/theme.ts
    src/editor/index.ts <- src/editor/editor.tsx
    later src/editor/index.ts <- src/editor/options.ts
    src/editor/editor.tsx <- src/editor/options.ts src/editor/keys.ts
    later src/editor/editor.tsx <- src/theme.ts
    """),
    gold("types", "typescript", r'''
=== index.d.ts
/// <reference path="globals.d.ts" />
import { A } from './a';
=== globals.d.ts
declare const x: number;
=== a.d.ts
export declare class A {}
=== use.mts
import { A } from './a.js';
import { run } from './run.mjs';
export const when = async () => (await import('./late.js')).late;
=== run.mts
export const run = `${1} import './use'`;
=== late.ts
export const late = 1;
''', """
    later index.d.ts <- globals.d.ts
    index.d.ts <- a.d.ts
    use.mts <- a.d.ts run.mts
    later use.mts <- late.ts
    """),
    gold("front", "typescript", r'''
=== src/components/Button.vue
<template><b @click="x = '</b>'">import './nothing'</b></template>
<script setup lang="ts">
import { color } from '~/theme/color'
import Icon from './Icon.vue'
</script>
=== src/components/Icon.vue
<script>
export default { name: 'import x from "./Button.vue"' }
</script>
=== src/theme/color.ts
export const color = 'red'
=== src/app.ts
import Button from '@/components/Button.vue'
export * as theme from './theme/color'
''', """
    src/components/Button.vue <- src/theme/color.ts src/components/Icon.vue
    src/app.ts <- src/components/Button.vue src/theme/color.ts
    """),
]  # fmt: skip

C = [
    gold("list", "c", r'''
=== Makefile
all: list
=== include/list/list.h
#ifndef LIST_H
#include <stddef.h>
#include "list/node.h"
struct list { struct node *first; };
#endif
=== include/list/node.h
struct node { int value; };
=== include/list/all.h
#ifndef ALL_H
#define ALL_H
#include "node.h"
#include "list.h"
#include "text.h"
#endif
=== include/list/text.h
char *text_of(int value);
=== src/list.c
#include <list/list.h>
#include <string.h>
#include "internal.h"
// #include "main.c"
const char *s = "#include \"main.c\"";
=== src/internal.h
/* #include "list.c" */
#if 0
#include "list.c"
#endif
# include <list/node.h>
=== src/main.c
#include <list/all.h>
int main(void) { struct list l; return 0; }
=== src/string.h
int mine;
''', """
    include/list/list.h <- include/list/node.h
    include/list/all.h <- include/list/node.h include/list/list.h include/list/text.h
    src/list.c <- include/list/list.h src/internal.h
    src/internal.h <- include/list/node.h
    src/main.c <- include/list/all.h include/list/list.h
    """),
    gold("loop", "c", r'''
=== a.h
#include "b.h"
=== b.h
#include "a.h"
=== main.c
#include "a.h"
#include MACRO
''', """
    a.h <- b.h
    b.h <- a.h
    main.c <- a.h
    broken b.h <- a.h
    """),
    gold("nested", "c", r'''
=== core/util.h
int util(void);
=== drivers/net/util.h
int net_util(void);
=== drivers/net/card.c
#include "util.h"
#include "../../core/util.h"
#include "core/bus.h"
=== core/bus.h
#include "util.h"
=== drivers/disk.c
#include "util.h"
=== app.c
#include <core/bus.h>
#include "net/util.h"
''', """
    drivers/net/card.c <- drivers/net/util.h core/util.h core/bus.h
    core/bus.h <- core/util.h
    drivers/disk.c <- core/util.h
    app.c <- core/bus.h drivers/net/util.h
    """),
]  # fmt: skip

CPP = [
    gold("shapes", "cpp", r'''
=== include/shapes/shape.hpp
#pragma once
#include <memory>
namespace shapes { class Shape { public: virtual double area() const = 0; }; }
=== include/shapes/circle.hpp
#pragma once
#include <shapes/shape.hpp>
namespace shapes { class Circle : public Shape {}; }
=== include/shapes/square.hpp
#pragma once
#include "shape.hpp"
namespace shapes { class Square : public Shape {}; }
=== include/shapes.hpp
#pragma once
#include <shapes/circle.hpp>
#include <shapes/square.hpp>
=== src/circle.cpp
#include <shapes/circle.hpp>
const char* raw = R"x(
#include "square.cpp"
)x";
int big = 1'000'000;
=== src/square.cpp
#include "shapes/square.hpp"
=== app/main.cpp
#include <vector>
#include <shapes.hpp>
int main() { shapes::Circle c; }
''', """
    include/shapes/circle.hpp <- include/shapes/shape.hpp
    include/shapes/square.hpp <- include/shapes/shape.hpp
    include/shapes.hpp <- include/shapes/circle.hpp include/shapes/square.hpp
    src/circle.cpp <- include/shapes/circle.hpp
    src/square.cpp <- include/shapes/square.hpp
    app/main.cpp <- include/shapes.hpp include/shapes/circle.hpp
    """),
    gold("matrix", "cpp", r'''
=== matrix/Matrix
#include "src/Core.h"
=== matrix/src/Core.h
template <class T> struct Core;
#include "Core.inl"
=== matrix/src/Core.inl
template <class T> struct Core {};
=== matrix/src/Solver.h
#include "./Core.h"
class Solver : Core<int> {};
=== test/solve.cc
#include "matrix/src/Solver.h"
#include <gtest/gtest.h>
''', """
    matrix/Matrix <- matrix/src/Core.h
    matrix/src/Core.h <- matrix/src/Core.inl
    matrix/src/Solver.h <- matrix/src/Core.h
    test/solve.cc <- matrix/src/Solver.h
    """),
    gold("cuda", "cpp", r'''
=== kernels/add.cuh
#include "common/check.h"
__global__ void add();
=== kernels/add.cu
#include "add.cuh"
=== common/check.h
#include <cstdio>
#define CHECK(x) std::abort()
=== main.cpp
#include "kernels/add.cuh"
#include "common/check.h"
''', """
    kernels/add.cuh <- common/check.h
    kernels/add.cu <- kernels/add.cuh
    main.cpp <- kernels/add.cuh common/check.h
    """),
]  # fmt: skip
