//! `perilune doctor`: what this machine offers, what of it is used and why, and what to do about what is missing.
//! Changes nothing and measures nothing; `perilune bench` measures.

use super::output::{print, print_with};
use super::peak_memory::kib_of;
use super::units;
use crate::checkpoint::free_space::free_bytes;
use crate::error::Result;
use crate::host::lua_version::lua_version;
use crate::host::sandbox::executable;
use crate::host::sandbox_job::{Outcome, Status, find_python, probe};
use crate::kernels::cpu::isa::{F32_CHOICES, Isa, isa};
use crate::kernels::cpu::threads::{cores, threads};
use crate::kernels::cuda::compile::nvrtc_version;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda_probe::{self, Absence, Driver};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Show what this machine offers, what of it is used, and how to mend what is missing.
#[derive(clap::Args)]
pub struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One line of the report.
struct Finding {
    name: &'static str,
    text: String,
    /// What to do; none if all is well.
    remedy: Option<String>,
    value: Value,
}

/// Prints the report. Errors: those of [`super::output::print`]; what cannot be found out is said so.
pub fn doctor(args: DoctorArgs) -> Result<()> {
    let held = executable().and_then(|executable| probe(&executable));
    let probed = cuda_probe::probe();
    let mut findings = vec![versions(), rustc(), cpu(), instructions(), thread_count(), memory(), disk(), sandbox(&held, find_python())];
    findings.push(gpu(&probed));
    findings.extend(kernels(&probed));
    if args.json {
        let object: serde_json::Map<String, Value> = findings
            .into_iter()
            .map(|finding| {
                let mut value = finding.value;
                value["remedy"] = json!(finding.remedy);
                (finding.name.to_owned(), value)
            })
            .collect();
        return print(&format!("{:#}\n", Value::Object(object)));
    }
    print_with(|out| {
        for finding in &findings {
            writeln!(out, "{:<13}{}", finding.name, finding.text)?;
            if let Some(remedy) = &finding.remedy {
                writeln!(out, "{:<13}-> {remedy}", "")?;
            }
        }
        Ok(())
    })
}

fn versions() -> Finding {
    let (perilune, lua) = (env!("CARGO_PKG_VERSION"), lua_version());
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    Finding {
        name: "perilune",
        text: format!("{perilune} ({build} build), {lua}"),
        remedy: cfg!(debug_assertions).then(|| "kernels of a debug build are many times slower: cargo build --release".into()),
        value: json!({ "version": perilune, "lua": lua, "build": build }),
    }
}

fn rustc() -> Finding {
    let needed = env!("CARGO_PKG_RUST_VERSION");
    let output = std::process::Command::new("rustc").arg("--version").output().ok();
    let found = output.filter(|output| output.status.success()).and_then(|output| version_in(&String::from_utf8_lossy(&output.stdout)));
    rustc_finding(found.as_deref(), needed)
}

/// `1.88.0` out of `rustc 1.88.0 (6b00bc388 2025-06-23)`.
fn version_in(line: &str) -> Option<String> {
    line.split_whitespace().nth(1).map(str::to_owned)
}

fn rustc_finding(found: Option<&str>, needed: &str) -> Finding {
    let numbers = |version: &str| -> Vec<u32> { version.split(['.', '-']).map_while(|part| part.parse().ok()).collect() };
    let remedy = match found {
        None => Some(format!("only building needs it: install Rust {needed} or newer with rustup")),
        Some(found) if numbers(found) < numbers(needed) => Some(format!("building needs {needed} or newer: rustup update")),
        Some(_) => None,
    };
    let text = found.map_or_else(|| "not found".into(), |found| format!("{found} (building needs {needed})"));
    Finding { name: "rustc", text, remedy, value: json!({ "version": found, "needed": needed }) }
}

fn cpu() -> Finding {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")).map(|rest| rest.trim_start_matches([' ', '\t', ':']));
    let model = model.unwrap_or(std::env::consts::ARCH).to_owned();
    Finding { name: "cpu", text: format!("{model}, {} cores", cores()), remedy: None, value: json!({ "model": model, "cores": cores() }) }
}

/// What is wrong with a variable that chooses how to compute: a value that nothing is called, which would be passed over. One that
/// this machine cannot follow is no fault: the same variables serve several machines.
pub fn environment_fault(value: impl Fn(&str) -> Option<String>) -> Option<String> {
    let is_count = |text: &str| text.parse::<usize>().is_ok_and(|count| count > 0);
    let isas = Isa::ALL.map(Isa::name);
    let fault = |name: &str, fits: &dyn Fn(&str) -> bool, expected: String| {
        let text = value(name).filter(|text| !fits(text))?;
        Some(format!("{name} is {text:?}: set it to {expected}, or unset it"))
    };
    fault("PERILUNE_THREADS", &is_count, "a number from 1".into())
        .or_else(|| fault("PERILUNE_ISA", &|name| isas.contains(&name), format!("one of {}", isas.join(", "))))
        .or_else(|| fault("PERILUNE_F32", &|name| F32_CHOICES.contains(&name), F32_CHOICES.join(" or ")))
}

fn instructions() -> Finding {
    let finding = instructions_finding(isa(), Isa::best(), std::env::var("PERILUNE_ISA").ok().as_deref());
    f32_finding(finding, isa() == Isa::AmxBf16, std::env::var("PERILUNE_F32").ok().as_deref())
}

/// Adds to `finding` where f32 runs on a processor whose AMX is in use, and what `PERILUNE_F32` has to do with it.
fn f32_finding(mut finding: Finding, has_amx: bool, asked: Option<&str>) -> Finding {
    let known = asked.filter(|asked| F32_CHOICES.contains(asked));
    if has_amx {
        finding.value["f32"] = json!({ "run": known.unwrap_or("amx"), "generate": known.unwrap_or("avx512"), "asked": asked });
        finding.text += &match known {
            Some(choice) => format!("; f32 on {choice} (PERILUNE_F32 names it)"),
            None => "; f32 on amx in runs, on avx512 in commands that only generate".into(),
        };
    }
    if let Some(asked) = asked.filter(|_| known.is_none() || !has_amx) {
        finding.text += &format!("; PERILUNE_F32 is {asked:?} and changes nothing");
        let choices = F32_CHOICES.join(" or ");
        finding.remedy = finding.remedy.or(Some(format!("unset PERILUNE_F32, or set it to {choices} where AMX is in use")));
    }
    finding
}

fn instructions_finding(used: Isa, best: Isa, asked: Option<&str>) -> Finding {
    let known = Isa::ALL.map(Isa::name).join(", ");
    let why = match asked {
        None => "the best this processor has".to_owned(),
        Some(name) if name == used.name() && used == best => "PERILUNE_ISA names it, and it is the best this processor has".to_owned(),
        Some(name) if name == used.name() => format!("PERILUNE_ISA names it; this processor has {}", best.name()),
        Some(name) if Isa::ALL.iter().any(|isa| isa.name() == name) => format!("PERILUNE_ISA names {name}, which this processor lacks"),
        Some(name) => format!("PERILUNE_ISA is {name:?}, which is none of {known}"),
    };
    let remedy = match asked {
        Some(name) if name != used.name() => Some(format!("unset PERILUNE_ISA, or set it to one of {known}")),
        Some(_) if used < best => Some("unset PERILUNE_ISA for full speed".into()),
        _ if best == Isa::Portable => Some("vector kernels need AVX2 with FMA (x86-64-v3); without them everything is much slower".into()),
        _ => None,
    };
    let value = json!({ "used": used.name(), "best": best.name(), "asked": asked });
    Finding { name: "instructions", text: format!("{} ({why})", used.name()), remedy, value }
}

fn thread_count() -> Finding {
    let asked = std::env::var("PERILUNE_THREADS").ok();
    let (used, cores) = (threads(), cores());
    let fits = asked.as_deref().is_none_or(|text| text.parse() == Ok(used));
    let source = if asked.is_some() { "PERILUNE_THREADS" } else { "one a core" };
    let remedy = if !fits {
        Some(format!(
            "PERILUNE_THREADS is {:?}: set it to a number from 1 to {}, or unset it",
            asked.as_deref().unwrap_or(""),
            cores.max(2)
        ))
    } else {
        (used < cores).then(|| format!("{} cores stay idle: unset PERILUNE_THREADS", cores - used))
    };
    Finding { name: "threads", text: format!("{used} ({source})"), remedy, value: json!({ "used": used, "cores": cores, "asked": asked }) }
}

fn memory() -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let bytes = |key| kib_of(&text, key).map(|kib| kib * 1024);
    // A container may have less than the machine.
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse::<u64>().ok());
    memory_finding(bytes("MemTotal:"), bytes("MemAvailable:"), limit)
}

fn memory_finding(total: Option<u64>, available: Option<u64>, limit: Option<u64>) -> Finding {
    let limit = limit.filter(|limit| total.is_none_or(|total| *limit < total));
    let show = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".into(), units::bytes);
    let mut text = format!("{} of {} available", show(available), show(total));
    if let Some(limit) = limit {
        text += &format!(", this container may use {}", units::bytes(limit));
    }
    let least = limit.or(available).filter(|bytes| *bytes < 2 << 30);
    let remedy = least.map(|_| "2 GiB are little: `perilune params MODEL` says what a model needs".into());
    Finding { name: "memory", text, remedy, value: json!({ "total_bytes": total, "available_bytes": available, "limit_bytes": limit }) }
}

fn disk() -> Finding {
    match free_bytes(Path::new(".")) {
        Ok(free) => {
            let remedy =
                (free < 4 << 30).then(|| "checkpoints go below this folder by default: free some space or pass --runs FOLDER".into());
            Finding { name: "disk", text: format!("{} free here", units::bytes(free)), remedy, value: json!({ "free_bytes": free }) }
        }
        Err(error) => {
            let remedy = Some("start perilune in a folder that you can read".into());
            Finding { name: "disk", text: error.to_string(), remedy, value: json!({ "error": error.to_string() }) }
        }
    }
}

/// Whether programs that a model wrote can be held, and where Python is.
fn sandbox(probed: &Result<Outcome>, python: Option<PathBuf>) -> Finding {
    let missing = match probed {
        Ok(outcome) if outcome.status == Status::Ok => None,
        Ok(outcome) => Some(outcome.reason.clone().unwrap_or_else(|| outcome.status.name().into())),
        Err(error) => Some(error.to_string()),
    };
    let interpreter = python.as_ref().map_or_else(|| "no python3".into(), |path| path.display().to_string());
    let text = match &missing {
        None => format!("holds programs of models: Lua, {interpreter}"),
        Some(why) => why.clone(),
    };
    let remedy = missing.as_ref().map(|_| "rewards by programs take Linux 5.13 or newer with Landlock and seccomp switched on".into());
    Finding { name: "sandbox", text, remedy, value: json!({ "holds": missing.is_none(), "python": python }) }
}

/// What compiles the kernels of a GPU; none where there is no GPU.
fn kernels(probed: &std::result::Result<Driver, Absence>) -> Option<Finding> {
    probed.as_ref().ok()?;
    let name = "kernels";
    Some(match nvrtc_version("doctor") {
        Ok((major, minor)) => {
            let value = json!({ "nvrtc": format!("{major}.{minor}") });
            Finding { name, text: format!("compiled at first use by NVRTC {major}.{minor}"), remedy: None, value }
        }
        Err(error) => {
            let remedy = Some("without it the GPU is not used; the CPU is".into());
            Finding { name, text: error.to_string(), remedy, value: json!({ "nvrtc": null }) }
        }
    })
}

fn gpu(probed: &std::result::Result<Driver, Absence>) -> Finding {
    match probed {
        Ok(driver) => {
            let line = |gpu: &cuda_probe::Gpu| {
                let (major, minor) = gpu.compute_capability;
                format!("{}, {}, compute capability {major}.{minor}", gpu.name, units::bytes(gpu.memory_bytes as u64))
            };
            let gpus: Vec<Value> = driver
                .gpus
                .iter()
                .map(|gpu| {
                    let (major, minor) = gpu.compute_capability;
                    json!({ "name": gpu.name, "memory_bytes": gpu.memory_bytes, "compute_capability": format!("{major}.{minor}") })
                })
                .collect();
            let (major, minor) = driver.cuda;
            let lines: Vec<String> = driver.gpus.iter().map(line).collect();
            let old = driver.gpus.iter().any(|gpu| gpu.compute_capability < Device::CAPABILITY_LEAST);
            Finding {
                name: "gpu",
                text: format!("{}; driver for CUDA {major}.{minor}", lines.join("; ")),
                remedy: old.then(|| "bf16 products need compute capability 8.0 or newer; this GPU is older".into()),
                value: json!({ "cuda": format!("{major}.{minor}"), "gpus": gpus }),
            }
        }
        Err(absence) => Finding {
            name: "gpu",
            text: format!("none: {}", absence.reason()),
            remedy: Some(absence.remedy().to_owned()),
            value: json!({ "gpus": [], "reason": absence.reason() }),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda_probe::Gpu;

    #[test]
    fn every_finding_says_something_and_has_an_object() {
        for finding in [versions(), rustc(), cpu(), instructions(), thread_count(), memory(), disk(), gpu(&cuda_probe::probe())] {
            assert!(!finding.text.is_empty() && finding.value.is_object(), "{}", finding.name);
        }
    }

    #[test]
    fn the_choice_of_instructions_is_explained() {
        let check = |used, asked, text: &str, has_remedy| {
            let finding = instructions_finding(used, Isa::Avx512, asked);
            assert!(finding.text.contains(text) && finding.remedy.is_some() == has_remedy, "{} {:?}", finding.text, finding.remedy);
        };
        check(Isa::Avx512, None, "the best this processor has", false);
        check(Isa::Avx512, Some("avx512"), "is the best", false);
        check(Isa::Avx2, Some("avx2"), "this processor has avx512", true);
        check(Isa::Avx512, Some("avx512_bf16"), "which this processor lacks", true);
        check(Isa::Avx512, Some("sse9"), "none of portable", true);
        assert!(instructions_finding(Isa::Portable, Isa::Portable, None).remedy.is_some());
        let f32 = |has_amx, asked| f32_finding(instructions_finding(Isa::Avx2, Isa::Avx2, None), has_amx, asked);
        assert!(f32(false, None).remedy.is_none() && f32(true, Some("amx")).text.ends_with("f32 on amx (PERILUNE_F32 names it)"));
        assert!(f32(true, None).text.contains("on amx in runs") && f32(true, None).remedy.is_none());
        assert!(f32(false, Some("amx")).remedy.is_some() && f32(true, Some("fast")).text.contains("changes nothing"));
    }

    #[test]
    fn a_variable_that_would_be_passed_over_is_a_fault() {
        let check = |name: &'static str, text: &'static str, says: Option<&str>| {
            let fault = environment_fault(|asked| (asked == name).then(|| text.to_owned()));
            assert_eq!(fault.is_some(), says.is_some(), "{fault:?}");
            assert!(says.is_none_or(|says| fault.unwrap().contains(says)), "{name}={text}");
        };
        check("PERILUNE_THREADS", "64", None);
        for text in ["x", "0", "-1", "2.5", ""] {
            check("PERILUNE_THREADS", text, Some("set it to a number from 1, or unset it"));
        }
        check("PERILUNE_ISA", "amx_bf16", None);
        check("PERILUNE_ISA", "sse9", Some("\"sse9\": set it to one of portable, avx2"));
        check("PERILUNE_F32", "fast", Some("amx or avx512"));
        check("PERILUNE_OTHER", "x", None);
    }

    #[test]
    fn remedies_come_where_something_is_missing() {
        let refused = |status, reason: &str| {
            let (reason, missing) = (Some(reason.to_string()), Vec::new());
            Ok(Outcome { status, reason, stdout: vec![], stderr: vec![], exit: None, seconds: 0.0, missing })
        };
        let finding = sandbox(&refused(Status::Refused, "no Landlock"), None);
        assert!(finding.text == "no Landlock" && finding.remedy.is_some() && finding.value["holds"] == false);
        let finding = sandbox(&refused(Status::Ok, ""), Some("/usr/bin/python3".into()));
        assert!(finding.text.ends_with("Lua, /usr/bin/python3") && finding.remedy.is_none() && finding.value["holds"] == true);
        assert!(rustc_finding(None, "1.88").remedy.unwrap().contains("rustup"));
        assert!(rustc_finding(Some("1.87.0"), "1.88").remedy.unwrap().contains("update"));
        assert!(rustc_finding(Some("1.88.0"), "1.88").remedy.is_none());
        assert!(rustc_finding(Some("1.100.0-nightly"), "1.88").remedy.is_none());
        assert_eq!(version_in("rustc 1.88.0 (6b00bc388 2025-06-23)").unwrap(), "1.88.0");
        assert!(memory_finding(Some(24 << 30), Some(1 << 30), None).remedy.is_some());
        let limited = memory_finding(Some(24 << 30), Some(20 << 30), Some(8 << 30));
        assert!(limited.text.contains("8.00 GiB") && limited.remedy.is_none(), "{}", limited.text);
        assert!(memory_finding(None, None, None).text.contains("unknown"));
    }

    #[test]
    fn a_gpu_and_its_absence_are_described() {
        assert!(kernels(&Err(Absence::NoDriver)).is_none(), "without a GPU nobody asks for its compiler");
        let device = Gpu { name: "Example".into(), memory_bytes: 80 << 30, compute_capability: (9, 0) };
        let found = gpu(&Ok(Driver { cuda: (13, 0), gpus: vec![device.clone()] }));
        assert!(found.text.contains("Example, 80.0 GiB, compute capability 9.0; driver for CUDA 13.0") && found.remedy.is_none());
        let old = gpu(&Ok(Driver { cuda: (12, 4), gpus: vec![Gpu { compute_capability: (7, 5), ..device }] }));
        assert!(old.remedy.is_some());
        for absence in [Absence::NoDriver, Absence::NoDevice, Absence::Refused { call: "cuInit", error: "CUDA_ERROR_UNKNOWN".into() }] {
            let finding = gpu(&Err(absence));
            assert!(finding.text.starts_with("none: ") && finding.remedy.is_some());
        }
    }
}
