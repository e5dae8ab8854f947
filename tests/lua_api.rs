//! The stubs that editors read are what scripts can call: compared with the live tables both ways, with the arguments and
//! their documentation. The modules of `std` document themselves.
//! A type checker reads them too, by hand: `cargo install emmylua_check` (0.25), then in a folder with scripts
//! `perilune types . && emmylua_check .`, which finds nothing in scripts/pretrain.lua.

use perilune::host::call::Function;
use perilune::host::modules::{Embedded, STDLIB, STUBS};
use perilune::host::progress::Screen;
use perilune::host::vm::{NAMESPACES, TOP, Vm, classes};
use std::collections::BTreeMap;
use std::path::Path;

/// A `function name(params) end` line with the comments above it.
#[derive(Debug)]
struct Stub {
    params: Vec<String>,
    docs: Vec<String>,
}

fn stubs(text: &str) -> BTreeMap<String, Stub> {
    let mut found = BTreeMap::new();
    let mut docs: Vec<String> = Vec::new();
    for line in text.lines() {
        if let Some(doc) = line.strip_prefix("---") {
            docs.push(doc.to_string());
            continue;
        }
        if let Some((name, rest)) = line.strip_prefix("function ").and_then(|line| line.split_once('(')) {
            let params = rest.split(')').next().unwrap();
            let params = params.split(',').map(|param| param.trim().to_string()).filter(|param| !param.is_empty()).collect();
            let stub = Stub { params, docs: std::mem::take(&mut docs) };
            // A namespace is a local of its file, since editors follow the fields of locals alone: `data.text` is engine.data.text.
            let spaced = NAMESPACES.iter().any(|(space, _)| name.split_once('.').is_some_and(|(front, _)| front == *space));
            let name = if spaced { format!("engine.{name}") } else { name.to_string() };
            assert!(found.insert(name.clone(), stub).is_none(), "{name} has two stubs");
        }
        docs.clear();
    }
    found
}

fn all_stubs() -> BTreeMap<String, Stub> {
    let mut all = BTreeMap::new();
    for file in STUBS {
        assert!(file.text.starts_with("---@meta"), "{}", file.path);
        for (name, stub) in stubs(file.text) {
            assert!(all.insert(name.clone(), stub).is_none(), "{name} has two stubs");
        }
    }
    all
}

/// Name as the stubs write it, and the function.
fn live() -> Vec<(String, &'static Function)> {
    let mut live = Vec::new();
    for function in TOP.iter().copied().flatten() {
        live.push((format!("engine.{}", function.name()), function));
    }
    for (namespace, lists) in NAMESPACES {
        for function in lists.iter().copied().flatten() {
            assert_eq!(function.op, format!("{namespace}.{}", function.name()), "messages name another function");
            live.push((format!("engine.{namespace}.{}", function.name()), function));
        }
    }
    for class in classes() {
        for function in class.methods.iter().copied().flatten() {
            assert_eq!(function.op, format!("{}:{}", class.name, function.name()), "messages name another method");
            live.push((function.op.to_string(), function));
        }
    }
    live
}

#[test]
fn every_function_has_a_stub_and_every_stub_a_function() {
    let vm = Vm::new(Path::new("api.lua"), Screen::new(true)).unwrap();
    let (mut stubs, live) = (all_stubs(), live());
    assert!(live.len() > 90, "only {} functions", live.len());
    for (name, function) in live {
        let stub = stubs.remove(&name).unwrap_or_else(|| panic!("{name} has no stub in stdlib/meta"));
        let params: Vec<&str> = function.params.iter().map(|param| param.trim_end_matches('?')).collect();
        assert_eq!(stub.params, params, "{name}");
        let prose = stub.docs.iter().any(|doc| !doc.trim().is_empty() && !doc.trim_start().starts_with('@'));
        assert!(prose, "{name} has no description");
        let noted: Vec<&str> = stub.docs.iter().filter_map(|doc| doc.strip_prefix("@param ")).collect();
        assert_eq!(noted.len(), params.len(), "{name} documents {noted:?}");
        for (note, param) in noted.iter().zip(function.params) {
            let mut words = note.split_whitespace();
            assert_eq!(words.next(), Some(*param), "{name}");
            assert!(words.next().is_some(), "{name}: `{param}` has no type");
        }
        let example = stub.docs.iter().find_map(|doc| doc.trim().strip_prefix("Example: "));
        let example = example.unwrap_or_else(|| panic!("{name} has no example"));
        // A statement, or an expression.
        let parses = |code: &str| vm.lua().load(code).into_function().is_ok();
        assert!(parses(example) || parses(&format!("return {example}")), "{name}: the example is no Lua: {example}");
    }
    assert!(stubs.is_empty(), "stubs of nothing: {:?}", stubs.keys().collect::<Vec<_>>());
}

#[test]
fn every_field_of_an_object_is_in_its_class_and_back() {
    let text: String = STUBS.iter().map(|file| file.text).collect();
    for class in classes() {
        let head = format!("---@class engine.{}\n", class.name);
        let body = text.split_once(&head).unwrap_or_else(|| panic!("no class engine.{}", class.name)).1;
        let fields = body.lines().map_while(|line| line.strip_prefix("---@")).filter_map(|line| line.strip_prefix("field "));
        let fields: Vec<&str> = fields.filter_map(|field| field.split_whitespace().next()).collect();
        assert_eq!(fields, class.fields, "{}", class.name);
    }
}

#[test]
fn the_live_tables_hold_what_is_listed() {
    let vm = Vm::new(Path::new("api.lua"), Screen::new(true)).unwrap();
    let count: usize = vm
        .lua()
        .load(
            "local count = 0
            for _, value in pairs(require 'engine') do
              if type(value) == 'function' then count = count + 1
              else for _, inner in pairs(value) do assert(type(inner) == 'function') count = count + 1 end end
            end
            return count",
        )
        .eval()
        .unwrap();
    assert_eq!(count, live().iter().filter(|(name, _)| name.starts_with("engine.")).count());
}

#[test]
fn modules_of_std_document_what_they_return() {
    let vm = Vm::new(Path::new("api.lua"), Screen::new(true)).unwrap();
    for module in STDLIB {
        assert!(module.text.starts_with("--- "), "{} has no head", module.path);
        let name = module.path.trim_end_matches(".lua");
        let code = format!("local names = {{}} for name in pairs(require 'std.{name}') do names[#names + 1] = name end return names");
        let mut names: Vec<String> = vm.lua().load(code).eval().unwrap();
        names.sort();
        let own = stubs(module.text);
        let of = |module: &Embedded| -> Vec<String> {
            let prefix = format!("{}.", module.path.trim_end_matches(".lua"));
            stubs(module.text).keys().filter_map(|key| key.strip_prefix(&prefix)).map(str::to_string).collect()
        };
        // A module may hold what others of its name define: losses those of preference_losses.
        let parts = STDLIB.iter().filter(|part| part.path == module.path || part.path.ends_with(&format!("_{}", module.path)));
        let mut documented: Vec<String> = parts.flat_map(of).collect();
        documented.sort();
        assert_eq!(names, documented, "{}", module.path);
        for (name, stub) in &own {
            let notes = stub.docs.iter().filter(|doc| doc.starts_with("@param")).count();
            assert_eq!(notes, stub.params.len(), "{name}");
            assert!(stub.docs.iter().any(|doc| doc.starts_with("@return")), "{name}");
        }
    }
}
