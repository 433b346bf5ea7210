"""The same for Java, Go and Rust."""

from tests.data.code_gold import CPP, JAVASCRIPT, PYTHON, TYPESCRIPT, C, gold

JAVA = [
    gold("bank", "java", r'''
=== pom.xml
<project></project>
=== src/main/java/org/bank/Account.java
package org.bank;
import java.util.List;
import org.bank.money.Amount;
import static org.bank.money.Amount.ZERO;
/** import org.bank.Main; */
public class Account { String s = "import org.bank.Main;"; Ledger ledger; }
=== src/main/java/org/bank/Ledger.java
package org.bank;
import org.bank.money.*;
class Ledger { Currency c; public static class Entry {} }
=== src/main/java/org/bank/money/Amount.java
package org.bank.money;
public record Amount(long cents) { public static final Amount ZERO = null; }
=== src/main/java/org/bank/money/Currency.java
package org.bank.money;
public enum Currency { EUR }
=== src/main/java/org/bank/Main.java
package org.bank;
import org.bank.Ledger.Entry;
import static org.bank.money.Currency.*;
public class Main { Account a; }
=== src/test/java/org/bank/AccountTest.java
package org.bank;
import org.junit.Test;
class AccountTest { Account a; }
''', """
    src/main/java/org/bank/Account.java <- src/main/java/org/bank/money/Amount.java
    later src/main/java/org/bank/Account.java <- src/main/java/org/bank/Ledger.java
    src/main/java/org/bank/Ledger.java <- src/main/java/org/bank/money/Currency.java
    src/main/java/org/bank/Main.java <- src/main/java/org/bank/Ledger.java src/main/java/org/bank/money/Currency.java
    later src/main/java/org/bank/Main.java <- src/main/java/org/bank/Account.java
    later src/test/java/org/bank/AccountTest.java <- src/main/java/org/bank/Account.java
    """),
    gold("events", "java", r'''
=== core/src/events/Bus.java
package events;
import events.api.Listener;
import events.api.Event;
public class Bus {}
=== core/src/events/api/Listener.java
package events.api;
public interface Listener { void on(Event e); }
=== core/src/events/api/Event.java
package events.api;
import events.Bus;
public abstract class Event { Listener l; Bus bus; }
=== app/src/app/App.java
package app;
import events.*;
import events.api.*;
class App { Bus bus; Event event; }
''', """
    core/src/events/Bus.java <- core/src/events/api/Listener.java core/src/events/api/Event.java
    later core/src/events/api/Listener.java <- core/src/events/api/Event.java
    core/src/events/api/Event.java <- core/src/events/Bus.java
    later core/src/events/api/Event.java <- core/src/events/api/Listener.java
    app/src/app/App.java <- core/src/events/Bus.java core/src/events/api/Event.java
    broken core/src/events/api/Event.java <- core/src/events/Bus.java
    broken core/src/events/api/Listener.java <- core/src/events/api/Event.java
    """),
    gold("flat", "java", r'''
=== Util.java
class Util {}
=== Main.java
import java.io.*;
class Main { Util u; }
=== tool/Tool.java
package tool; import tool.deep.Thing;
class Tool {}
=== tool/deep/Thing.java
package tool.deep;
public @interface Thing {}
''', """
    later Main.java <- Util.java
    tool/Tool.java <- tool/deep/Thing.java
    """),
]  # fmt: skip

GO = [
    gold("api", "go", r'''
=== go.mod
module example.org/api

go 1.22
=== main.go
package main

import (
	"fmt"
	"example.org/api/internal/store"
	h "example.org/api/handlers" // "example.org/api/nothing"
)

var s = `import "example.org/api/x"`

func main() { fmt.Println(h.New(store.Open()), version) }
=== version.go
package main

const version = "1"
=== handlers/handlers.go
package handlers

import "example.org/api/internal/store"

func New(s *store.Store) *Handler { return &Handler{} }
=== handlers/types.go
package handlers

type Handler struct{}
=== handlers/handlers_test.go
package handlers_test

import (
	"testing"
	"example.org/api/handlers"
)
=== internal/store/store.go
package store

type Store struct{ rows []row }

func Open() *Store { return nil }
=== internal/store/row.go
package store

type (
	row struct{ id int }
)
''', """
    main.go <- internal/store/store.go internal/store/row.go handlers/handlers.go handlers/types.go
    later main.go <- version.go
    handlers/handlers.go <- internal/store/store.go internal/store/row.go
    later handlers/handlers.go <- handlers/types.go
    handlers/handlers_test.go <- handlers/handlers.go handlers/types.go
    later internal/store/store.go <- internal/store/row.go
    """),
    gold("two", "go", r'''
=== go.work
go 1.22
use ./lib
=== lib/go.mod
module example.org/lib
=== lib/sum/sum.go
package sum

func Of(xs ...int) int { return 0 }
=== cmd/go.mod
module example.org/lib/cmd
require example.org/lib v1.0.0
=== cmd/tool/main.go
package main

import "example.org/lib/sum"
import _ "example.org/lib/cmd/plugin"

func main() { sum.Of(1) }
=== cmd/plugin/plugin.go
package plugin
''', """
    cmd/tool/main.go <- lib/sum/sum.go cmd/plugin/plugin.go
    """),
    gold("oldstyle", "go", r'''
=== a/a.go
package a

import . "github.com/someone/oldstyle/b"
=== b/b.go
package b

import "../c"
=== c/c.go
package c
''', """
    a/a.go <- b/b.go
    b/b.go <- c/c.go
    """),
]  # fmt: skip

RUST = [
    gold("parser", "rust", r'''
=== Cargo.toml
[package]
name = "my-parser"
=== src/lib.rs
//! use crate::nothing;
pub mod ast;
mod lexer;
pub mod error;
pub use crate::lexer::Lexer;
pub use error::{Error, Result as R};
=== src/ast.rs
use std::fmt;
use crate::error::Error;
pub enum Node<'a> { Text(&'a str), Char(char) }
const C: char = '"';
=== src/lexer/mod.rs
mod token;
pub use self::token::{Token, Kind};
use super::ast::{self, Node};
pub struct Lexer;
=== src/lexer/token.rs
use crate::R;
pub struct Token; pub enum Kind {}
/* use crate::lexer::Lexer; /* nested */ use crate::x; */
=== src/error.rs
pub struct Error;
pub type Result = ();
#[cfg(test)]
mod tests { use super::*; use crate::lexer::Token; }
=== src/main.rs
use my_parser::{ast::Node, Lexer};
mod options;
fn main() { let t = my_parser::lexer(); let s = r#"use crate::none;"#; crate::options::read(); }
=== src/options.rs
pub fn read() {}
=== tests/all.rs
mod common;
use my_parser::error::Error;
use common::setup;
=== tests/common/mod.rs
pub fn setup() {}
''', """
    later src/lib.rs <- src/ast.rs
    src/lib.rs <- src/lexer/mod.rs src/error.rs
    src/ast.rs <- src/error.rs
    src/lexer/mod.rs <- src/lexer/token.rs src/ast.rs
    src/lexer/token.rs <- src/error.rs
    later src/lexer/token.rs <- src/lib.rs
    later src/error.rs <- src/lexer/token.rs src/lexer/mod.rs
    src/main.rs <- src/ast.rs src/lexer/mod.rs src/options.rs
    later src/main.rs <- src/lib.rs
    tests/all.rs <- src/error.rs tests/common/mod.rs
    broken src/error.rs <- src/lexer/token.rs
    broken src/error.rs <- src/lexer/mod.rs
    broken src/lexer/token.rs <- src/lib.rs
    """),
    gold("space", "rust", r'''
=== Cargo.toml
[workspace]
members = ["core", "app"]
=== core/Cargo.toml
[package]
name = "core-lib"
version = "0.1.0"
=== core/src/lib.rs
pub mod math;
pub fn zero() -> i32 { 0 }
=== core/src/math.rs
pub mod vector;
pub fn add() -> i32 { super::zero() }
=== core/src/math/vector.rs
use super::add;
pub struct Vector;
=== app/Cargo.toml
[package]
name = "app"
=== app/src/main.rs
use core_lib::math::{vector::Vector, add as plus};
#[path = "odd/place.rs"]
mod placed;
=== app/src/odd/place.rs
use std::io::{self, Read};
=== app/src/bin/other.rs
use core_lib::zero;
''', """
    later core/src/lib.rs <- core/src/math.rs
    core/src/math.rs <- core/src/lib.rs
    later core/src/math.rs <- core/src/math/vector.rs
    core/src/math/vector.rs <- core/src/math.rs
    app/src/main.rs <- core/src/math/vector.rs core/src/math.rs
    later app/src/main.rs <- app/src/odd/place.rs
    app/src/bin/other.rs <- core/src/lib.rs
    broken core/src/lib.rs <- core/src/math.rs
    broken core/src/math.rs <- core/src/math/vector.rs
    """),
    gold("game", "rust", r'''
=== Cargo.toml
[package]
name = "game"
=== src/main.rs
mod world;
mod player;
use world::World;
=== src/world.rs
use crate::player::Player;
use rand::Rng;
pub struct World(Player);
=== src/player.rs
#[derive(Debug)]
pub struct Player { name: String }
mod inner { pub mod deep { use super::super::Player; } }
''', """
    src/main.rs <- src/world.rs
    later src/main.rs <- src/player.rs
    src/world.rs <- src/player.rs
    """),
]  # fmt: skip

ALL = (*PYTHON, *JAVASCRIPT, *TYPESCRIPT, *C, *CPP, *JAVA, *GO, *RUST)
