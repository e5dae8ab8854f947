//! What a user sees who made a mistake: each wrong script with the message it must give. A message begins with the file
//! and line that the user can mend.

use perilune::error::Error;
use perilune::host::progress::Screen;
use perilune::host::run::{Facts, Run, Start};
use perilune::host::vm::Vm;
use perilune::host::{args, workflow::Workflow};
use std::process::Command;
use std::sync::Arc;

/// Runs `script` as `perilune run s.lua` would in a fresh folder, and gives the error.
fn error_of(script: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s.lua");
    std::fs::write(&path, script).unwrap();
    std::fs::write(folder.path().join("broken.lua"), "return {\n  1 +\n}").unwrap();
    std::fs::write(folder.path().join("raises.lua"), "local x\nreturn x.y").unwrap();
    std::fs::write(folder.path().join("nothing.lua"), "local x = 1").unwrap();
    std::fs::write(folder.path().join("circle.lua"), "return require 'circle'").unwrap();
    std::fs::write(folder.path().join("bad.jsonl"), "{\"text\": \"a\"}\n{\"text\": }\n").unwrap();
    let run = || -> Result<(), Error> {
        let vm = Vm::new(&path, Screen::new(true))?;
        let Some(object) = vm.load()? else { return Ok(()) };
        let workflow = object.borrow::<Workflow>().unwrap();
        let values = args::parse(&workflow.specs, &[])?;
        let sources = vm.sources();
        let screen = Screen::new(true);
        let root = folder.path().join("runs");
        let facts = Facts::new(&workflow.name, "script.lua", &[], &values, 0);
        let run = Arc::new(Run::start(Start { root: &root, facts, sources: &sources, screen })?);
        workflow.call(vm.lua(), &run, &values)
    };
    let text = run().expect_err(script).to_string();
    text.replace(&format!("{}/", folder.path().display()), "")
}

/// A workflow whose function has `body` as its second line.
fn body(body: &str) -> String {
    format!(
        "local engine, here = require 'engine', ... ; return engine.workflow {{ name = 'w', args = {{ steps = 3 }}, run = function(run, args)\n{body}\nend }}"
    )
}

fn check(cases: &[(String, &[&str])]) {
    let mut wrong = String::new();
    for (script, parts) in cases {
        let got = error_of(script);
        let missing: Vec<_> = parts.iter().filter(|part| !got.contains(**part)).collect();
        let noise = ["[C]", "runtime error", "stack traceback", "panicked", "RuntimeError", "callback", "__mlua"];
        let noise: Vec<_> = noise.iter().filter(|noise| got.contains(**noise)).collect();
        if !missing.is_empty() || !noise.is_empty() || got.lines().count() > 12 {
            wrong.push_str(&format!("{script}\n  should say {missing:?}, not {noise:?}, in at most 12 lines; says\n{got}\n\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn mistakes_in_the_language() {
    let case = |script: &str| script.to_string();
    check(&[
        (case("local x = = 1"), &["s.lua:1: unexpected symbol near '='"]),
        (case("#!/usr/bin/perilune\nlocal x = ="), &["s.lua:2: unexpected symbol"]),
        (case("\nx = 1"), &["s.lua:2: `x` is not declared; write `local x`"]),
        (case("print(lenght)"), &["s.lua:1: `lenght` is not declared"]),
        (case("prnt(1)"), &["s.lua:1: `prnt` is not declared; did you mean `print`?"]),
        (case("print(debug.traceback())"), &["s.lua:1: `debug` is not declared; scripts do without Lua's debug library"]),
        (case("print(engine)"), &["`local engine = require \"engine\"`"]),
        (
            case("local x\nlocal function f() return x.y end\nf()"),
            &["s.lua:2: attempt to index a nil value", "called from:", "s.lua:3: in main chunk"],
        ),
        (case("error('my own')"), &["s.lua:1: my own"]),
        (case("require 'missing.module'"), &["s.lua:1: no module \"missing.module\"; looked for missing/module.lua"]),
        (case("require 'std.loses'"), &["s.lua:1: no module \"std.loses\"", "did you mean `losses`?"]),
        (case("require 'broken'"), &["broken.lua:3: unexpected symbol near '}'"]),
        (case("require 'raises'"), &["raises.lua:2: attempt to index a nil value", "s.lua:1:"]),
        (case("require 'nothing'"), &["s.lua:1: module \"nothing\" returns nothing"]),
        (case("require 'circle'"), &["circle.lua:1: module \"circle\" requires itself"]),
        (case("require(3)"), &["s.lua:1: require: `module` should be the name of a module"]),
        (case("return 3"), &["s.lua: a script returns engine.workflow { ... } or nothing, got 3"]),
        (case("math.randomseed(1)"), &["s.lua:1: math.randomseed", "--seed"]),
        (
            case("local ok, e = pcall(math.random, 2, 1) error(e, 0)"),
            &["s.lua:1: math.random: `bounds` should be the lower first, got 2 and 1"],
        ),
    ]);
}

#[test]
fn mistakes_with_the_engine() {
    let case = |script: &str| format!("local engine = require 'engine'\nlocal tensor = engine.tensor\n{script}");
    check(&[
        (case("engine.tensors()"), &["s.lua:3: there is no engine.tensors; did you mean `tensor`?"]),
        (case("tensor.zeroes{1}"), &["s.lua:3: there is no engine.tensor.zeroes; did you mean `zeros`?"]),
        (case("engine.mine = 1"), &["s.lua:3: engine belongs to the engine; mine cannot be added"]),
        (case("tensor.zeros()"), &["s.lua:3: tensor.zeros: `shape` should be given, got nil"]),
        (case("tensor.zeros(3)"), &["`shape` should be a list of integers, such as { 2, 3 }, got 3"]),
        (case("tensor.zeros({ 2, -1 })"), &["sizes of at least 0, got an entry that is -1"]),
        (case("tensor.zeros({ 2 }, { dtpe = 'f32' })"), &["`option` should be one of device, dtype, got `dtpe`; did you mean `dtype`?"]),
        (case("tensor.zeros({ 2 }, { dtype = 'f64' })"), &["`dtype` should be \"f32\", \"bf16\", \"i32\" or \"i8\", got \"f64\""]),
        (case("tensor.zeros({ 2 }, 'f32')"), &["`options` should be a table of options (device, dtype), got string \"f32\""]),
        (case("tensor.zeros({ 2 }, {}, 1)"), &["`arguments` should be 2 arguments", "got 3"]),
        (case("tensor.zeros({ 1 << 40, 1 << 20 })"), &["s.lua:3: zeros"]),
        (case("tensor.ones({ 2 }).sum()"), &["s.lua:3: Tensor:sum: `self` should be a Tensor in front; call it with a colon"]),
        (case("tensor.ones({ 2 }):summ()"), &["s.lua:3: Tensor has no method or field `summ`; did you mean `sum`?"]),
        (case("print('a loss of ' .. tensor.ones({}))"), &["s.lua:3: a Tensor is not joined to text by `..`; write tostring(x)"]),
        (case("engine.optim.adamw(engine.model.new {})()"), &["s.lua:3: attempt to call a Optimizer value"]),
        (case("tensor.ones({ 2 }).shape = 1"), &["the fields of a Tensor cannot be assigned"]),
        (case("tensor.ones({ 2 }):matmul(3)"), &["Tensor:matmul: `other` should be a tensor, got 3"]),
        (case("tensor.ones({ 2, 3 }):matmul(tensor.ones({ 2, 3 }))"), &["s.lua:3: matmul", "[2, 3]"]),
        (case("tensor.ones({ 2, 3 }):sum(5)"), &["s.lua:3: sum", "5"]),
        (case("tensor.ones({ 2 }):item()"), &["Tensor:item: `self` should be one element, got [2]"]),
        (case("return engine.workflow { run = function() end }"), &["s.lua:3: engine.workflow: `name` should be a string, got nil"]),
        (case("return engine.workflow { name = 'x' }"), &["`run` should be function(run, args) ... end, got nil"]),
        (
            case("return engine.workflow { name = 'x', run = print, arg = {} }"),
            &["one of name, args, run, got `arg`; did you mean `args`?"],
        ),
        (case("return engine.workflow { name = 'x', run = print, args = { seed = 1 } }"), &["another name, got `seed`"]),
        (case("return engine.workflow { name = 'x', run = print, args = { a = {} } }"), &["args.a", "type = \"strings\""]),
        (case("return engine.workflow { name = 'x', run = print, args = { a = { 1, 'b' } } }"), &["args.a", "a list of several types"]),
        (
            case("return engine.workflow { name = 'x', run = print, args = { a = { 5, max = 3 } } }"),
            &["the default of args.a: should be at most 3, got 5"],
        ),
        (case("return engine.workflow { name = 'x', run = print, args = { a = print } }"), &["args.a", "got a function"]),
        (
            case("return engine.workflow { name = 'x', run = print, args = { a = engine.required('text') } }"),
            &["engine.required: `type` should be"],
        ),
        (
            case("return engine.workflow { name = 'x', run = print, args = { a = engine.required('string') } }"),
            &["--a must be given: a string"],
        ),
    ]);
}

#[test]
fn mistakes_in_a_run() {
    check(&[
        (body("print(args.stesp)"), &["s.lua:2: args.stesp is not declared in the workflow's args; did you mean `steps`?"]),
        (body("args.steps = 4"), &["s.lua:2: args.steps cannot be set"]),
        (body("run:lopp('x')"), &["s.lua:2: Run has no method or field `lopp`; did you mean `loop`?"]),
        (body("run:loop('x', { stps = 3 })"), &["`stps`; did you mean `steps`?"]),
        (body("run:loop('x', {})"), &["s.lua:2: Run:loop", "to say where the loop ends"]),
        (
            body("for step in run:loop('x', { steps = 1 }) do step:log { 3 } end"),
            &["s.lua:2: Step:log: `values` should be values with names"],
        ),
        (body("for step in run:loop('x', { steps = 1 }) do step:log { time = 3 } end"), &["another name, got `time`"]),
        (
            body("for step in run:loop('x', { steps = 1 }) do step:log { loss = engine.tensor.ones { 2 } } end"),
            &["`loss` should be a number, or a tensor of one element (take its :mean()), got a Tensor f32 [2]"],
        ),
        (body("local s for step in run:loop('x', { steps = 2 }) do s = s or step end s:log { a = 1 }"), &["Step:log: step 0 is over"]),
        (body("for _ in run:loop('x', { steps = 1 }) do end run:loop('x', { steps = 1 })"), &["the loop \"x\" has run already"]),
        (
            body("run:model('m', 'no/such/folder')"),
            &["s.lua:2: no/such/folder: model: expected a folder on this machine, found none of this name"],
        ),
        (body("run:model('m', { preset = 'huge' })"), &["s.lua:2:", "tiny"]),
        (body("run:model('m', { layer = 2 })"), &["s.lua:2:", "layer"]),
        (body("run:model('m', {}, { dtype = 'i8' })"), &["Run:model: `dtype` should be \"f32\", \"bf16\" or \"int8\", got \"i8\""]),
        (body("run:optimizer('sgd', {})"), &["Run:optimizer: `kind` should be \"adamw\" or \"muon\", got string \"sgd\""]),
        (body("run:optimizer('adamw', run:model('m', {}), { lr = -1 })"), &["s.lua:2: adamw: `lr` should be a number from 0"]),
        (body("run:optimizer('adamw', run:model('m', {}, { frozen = true }))"), &["is the model frozen?"]),
        (body("run:data('d', run:model('d', {}))"), &["`data` should be a Data, got a Model"]),
        (body("run:model('m', {}) run:data('m', engine.data.text('s.lua'))"), &["`m`, which is a model of this run"]),
        (body("run:save('../up', run:model('m', {}))"), &["Run:save: `name` should be a name of letters"]),
        (body("engine.data.text('no.txt'):tokenizer(engine.tokenizer.bytes()):pack { seq_len = 8 }:take(1)"), &["s.lua:2: no.txt: cannot"]),
        (body("engine.data.jsonl(run.folder .. '/../../bad.jsonl'):take(2)"), &["s.lua:2:", "bad.jsonl", "line 2"]),
        (body("engine.data.text('s.lua'):pack { seq_len = 0 }"), &["Data:pack", "at least 1"]),
        (body("run:model('m', {}):logits(engine.data.batch { { 5000 } })"), &["s.lua:2:", "5000"]),
        (body("run:model('m', {}):freeze { 'layers.99' }"), &["s.lua:2: freeze: `names`", "such as layers.0", "\"layers.99\""]),
        (body("run:model('m', {}):freeze { 'q_proj' }"), &["s.lua:2: freeze: `names`", "k_proj", "in one matrix"]),
        (body("run:model('m', {}):freeze 'layers.0'"), &["s.lua:2: Model:freeze: `names` should be", "got string \"layers.0\""]),
        (body("run:model('m', {}):freeze { 1 }"), &["s.lua:2: Model:freeze: `names` should be a list of names, such as"]),
        (body("run:model('m', {}, { frozen = true }):freeze { 'layers.0' }"), &["s.lua:2: freeze: `names` should be weights that train"]),
        (body("run:model('m', {}):hidden_states(engine.data.batch { { 5 } }, { layer = 99 })"), &["s.lua:2: hidden_states: `layer`", "99"]),
        (body("run:model('m', {}):parameter('x')"), &["s.lua:2:", "\"x\""]),
    ]);
}

#[test]
fn the_program_says_how_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let run = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_perilune")).args(words).current_dir(folder.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let script = "#!/usr/bin/env perilune\n--- Says hello.\n--- Source: none.\nlocal engine = require 'engine'\nreturn engine.workflow { name = 'hello',\n  args = { who = { 'you', help = 'whom to greet' }, times = { 1, min = 1 } },\n  run = function(run, args) for step in run:loop('greet', { steps = args.times }) do print('hello ' .. args.who) step:log { n = step.count } end end }";
    std::fs::write(folder.path().join("hello.lua"), script).unwrap();
    let (code, out, _) = run(&["run", "hello.lua", "--help"]);
    assert_eq!(code, 0);
    for part in
        ["Says hello.", "Source: none.", "--who STRING", "whom to greet (default \"you\")", "--times INTEGER", "at least 1", "--seed"]
    {
        assert!(out.contains(part), "{part} not in\n{out}");
    }
    assert!(!folder.path().join("checkpoints").exists(), "help starts no run");
    let (code, out, err) = run(&["run", "hello.lua", "--who=me", "--times", "2", "--seed", "7"]);
    assert_eq!((code, out.as_str()), (0, "hello me\nhello me\n"), "{err}");
    assert!(err.contains("greet 2/2"), "{err}");
    let runs: Vec<_> = std::fs::read_dir(folder.path().join("checkpoints/runs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let read = |name: &str| std::fs::read_to_string(runs[0].join(name)).unwrap();
    let code: serde_json::Value = serde_json::from_str(&read("code/g0.json")).unwrap();
    assert_eq!(code["sources"][0]["path"], "hello.lua");
    assert_eq!(read(&format!("code/objects/{}", code["sources"][0]["hash"].as_str().unwrap())), script);
    let args: serde_json::Value = serde_json::from_str(&read("run.json")).unwrap();
    assert_eq!((&args["args"]["times"], &args["seed"]), (&2.into(), &7.into()));
    let metrics: Vec<serde_json::Value> = read("metrics.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(metrics.len(), 2);
    assert_eq!((&metrics[1]["loop"], &metrics[1]["step"], &metrics[1]["n"]), (&"greet".into(), &1.into(), &2.into()));
    let (code, out, err) = run(&["run", "hello.lua", "--quiet"]);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "hello you\n", ""));
    let (code, _, err) = run(&["run", "hello.lua", "--times", "0"]);
    assert_eq!(code, 1);
    assert!(err.contains("hello.lua: --times should be at least 1, got 0"), "{err}");
    let (code, _, err) = run(&["run", "nosuch.lua"]);
    assert_eq!(code, 1);
    assert!(err.contains("nosuch.lua: cannot read"), "{err}");
    assert_eq!(run(&["walk"]).0, 1);
    assert_eq!(run(&["--version"]).0, 0);
    let (code, out, _) = run(&["types"]);
    assert_eq!(code, 0, "{out}");
    assert!(folder.path().join(".luarc.json").is_file() && folder.path().join(".perilune/types/tensor.lua").is_file());
}

#[cfg(unix)]
#[test]
fn the_first_interrupt_ends_the_loop_at_its_step() {
    use std::io::{BufRead, BufReader};
    let folder = tempfile::tempdir().unwrap();
    let script = "local engine = require 'engine'\nreturn engine.workflow { name = 'long', run = function(run)\n  for step in run:loop('long', { steps = 1 << 40 }) do\n    step:log { n = step.count } if step.first then print('begun') end\n    local ok = pcall(function() for _ = 1, 100000 do end end) assert(ok)\n  end\nend }";
    std::fs::write(folder.path().join("long.lua"), script).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_perilune"))
        .args(["run", "long.lua"])
        .current_dir(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("stopping at the end of this step") && err.contains("stopping after step"), "{err}");
    assert!(err.contains("stopped; go on with: perilune resume"), "{err}");
}
