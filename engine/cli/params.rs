//! `perilune params MODEL|PRESET`: what a model has and what it takes to load, train and serve it, alone or with an adapter, before
//! any weight is read. The arithmetic is in model/sizes.rs.

use super::output::print;
use super::units;
use crate::error::{Error, Result};
use crate::kernels::element::Dtype;
use crate::model::config::Config;
use crate::model::flops::train_flops;
use crate::model::sizes::AdapterSize;
use crate::model::{Lora, presets, sizes};
use crate::tensor::Place;
use serde_json::{Value, json};
use std::path::Path;

/// Show a model's parameters, and the memory it takes to load, train and serve it.
#[derive(clap::Args)]
pub struct ParamsArgs {
    /// A folder with a config.json, or the name of a published size: 0.5B, 7B, Qwen2-57B-A14B.
    #[arg(value_name = "MODEL|PRESET")]
    model: String,
    /// Tokens of context to serve, and of a training sequence.
    #[arg(long, default_value_t = 4096)]
    context: usize,
    /// Texts served together.
    #[arg(long, default_value_t = 8)]
    sequences: usize,
    /// Also what a step of `sequences` of `context` tokens takes on a GPU, the largest part first; of `cuda`, `cuda:1` ... what
    /// of it fits. `gpu` needs none.
    #[arg(long, value_name = "gpu|cuda|cuda:N")]
    device: Option<String>,
    /// Also what it takes to train and serve an adapter of this rank (scripts: `--lora RANK`, in Lua `lora = { rank = RANK }`).
    #[arg(long, value_name = "RANK")]
    lora: Option<usize>,
    /// Modules that the adapter is on, as the option `targets` of `lora` names them: q_proj,v_proj,embed_tokens.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "lora")]
    targets: Vec<String>,
    /// The adapter scales rows (DoRA).
    #[arg(long, requires = "lora")]
    dora: bool,
    /// In what AdamW keeps its moments, as its option `moments` says.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    moments: String,
    /// List every tensor and its shape.
    #[arg(long)]
    tensors: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Prints the sizes. Errors: [`Error::Argument`] for a name that is neither a folder nor a preset; those of
/// [`Config::load`].
pub fn params(args: ParamsArgs) -> Result<()> {
    for (name, value, most) in [("--context", args.context, 1 << 30), ("--sequences", args.sequences, 1 << 20)] {
        if !(1..=most).contains(&value) {
            return Err(Error::argument("params", name, format!("a number from 1 to {most}"), value));
        }
    }
    let config = find(&args.model)?;
    let place = match args.device.as_deref() {
        None | Some("gpu") => Place::Host,
        Some(name) => Place::named(name)?,
    };
    let adapter = adapter(&args, &config)?;
    let mut report = report(&args, &config, adapter.as_ref());
    let mut text = text(&args, &config, adapter.as_ref());
    if args.device.is_some() {
        let (parts, lines) = on_device(&args, &config, adapter.as_ref(), &place);
        report["device"] = parts;
        text += &lines;
    }
    print(&if args.json { format!("{report:#}\n") } else { text })
}

/// The adapter that is asked for, and its size.
///
/// Errors: those of [`AdapterSize::of`].
fn adapter(args: &ParamsArgs, config: &Config) -> Result<Option<(Lora, AdapterSize)>> {
    let Some(rank) = args.lora else { return Ok(None) };
    let mut lora = Lora { rank, dora: args.dora, ..Lora::default() };
    if !args.targets.is_empty() {
        lora.targets.clone_from(&args.targets);
    }
    let size = AdapterSize::of(config, &lora)?;
    Ok(Some((lora, size)))
}

impl ParamsArgs {
    fn moments(&self) -> Dtype {
        Dtype::parse(&self.moments).expect("the parser knows them")
    }
}

/// Bytes that training the adapter keeps, those of its frozen base included; and those of serving both.
fn adapted_bytes(args: &ParamsArgs, config: &Config, size: &AdapterSize, dtype: Dtype) -> (u64, u64) {
    let serving = sizes::serve_bytes(config, dtype, args.context, args.sequences);
    (sizes::load_bytes(config, dtype) + size.train_bytes(dtype, args.moments()), serving.saturating_add(size.load_bytes(dtype)))
}

fn find(model: &str) -> Result<Config> {
    let folder = Path::new(model);
    if folder.is_dir() {
        return Config::load(folder);
    }
    presets::preset(model).map_err(|_| {
        let known = presets::names().collect::<Vec<_>>().join(", ");
        Error::argument("params", "MODEL|PRESET", format!("a folder with a config.json, or one of {known}"), format!("{model:?}"))
    })
}

/// What a training step takes on a GPU, and whether it and serving fit the one at `place`.
fn on_device(args: &ParamsArgs, config: &Config, adapter: Option<&(Lora, AdapterSize)>, place: &Place) -> (Value, String) {
    let tokens = args.context.saturating_mul(args.sequences);
    // A GPU that is not there is taken for a large one.
    let device_bytes = Some(place.device().map_or(u64::MAX, |device| device.memory_bytes as u64));
    let (mut report, mut lines) = (json!({ "tokens": tokens }), String::new());
    let fits = |bytes: u64| match place.device() {
        Some(device) if bytes > device.memory_bytes as u64 => format!(", more than {} has", device.name),
        Some(device) => format!(", {:.0}% of {}", 100.0 * bytes as f64 / device.memory_bytes as f64, device.name),
        None => String::new(),
    };
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let trainable = adapter.map_or(sizes::parameters(config).total, |(_, size)| size.parameters);
        let step = sizes::TrainingStep { dtype, tokens, trainable, moments: args.moments(), recompute: false, device_bytes };
        let parts = sizes::training_parts(config, &step);
        let total = parts.iter().fold(0, |total: u64, (_, bytes)| total.saturating_add(*bytes));
        let what = if adapter.is_some() { " of the adapter" } else { "" };
        lines += &format!("\na step{what} of {tokens} tokens on a GPU in {dtype}: {}{}\n", units::bytes(total), fits(total));
        for (part, bytes) in &parts {
            lines += &format!("  {part:<52}{:>12}\n", units::bytes(*bytes));
        }
        let serving = sizes::serve_bytes(config, dtype, args.context, args.sequences);
        lines += &format!("serving {} texts of {} tokens: {}{}\n", args.sequences, args.context, units::bytes(serving), fits(serving));
        let named: serde_json::Map<String, Value> = parts.iter().map(|(part, bytes)| ((*part).to_string(), json!(bytes))).collect();
        report[dtype.name()] = json!({ "train_bytes": total, "parts": named, "serve_bytes": serving });
    }
    report["memory_bytes"] = json!(place.device().map(|device| device.memory_bytes));
    (report, lines)
}

fn report(args: &ParamsArgs, config: &Config, adapter: Option<&(Lora, AdapterSize)>) -> Value {
    let count = sizes::parameters(config);
    let memory = |dtype: Dtype| {
        json!({
            "load_bytes": sizes::load_bytes(config, dtype),
            "train_bytes": sizes::train_bytes(config, dtype, args.moments()),
            "checkpoint_copy_bytes": sizes::checkpoint_copy_bytes(config, args.moments()),
            "serve_bytes": sizes::serve_bytes(config, dtype, args.context, args.sequences),
            "kv_cache_bytes_per_token": sizes::kv_cache_bytes_per_token(config, dtype),
        })
    };
    let mut report = json!({
        "parameters": { "total": count.total, "non_embedding": count.non_embedding, "activated": count.activated },
        "train_flops_per_token": train_flops(config, args.context) / args.context.max(1) as f64,
        "context_tokens": args.context,
        "sequences": args.sequences,
        "bf16": memory(Dtype::Bf16),
        "f32": memory(Dtype::F32),
    });
    if let Some((lora, size)) = adapter {
        let memory = |dtype: Dtype| {
            let (train, serve) = adapted_bytes(args, config, size, dtype);
            json!({ "train_bytes": train, "serve_bytes": serve })
        };
        report["adapter"] = json!({
            "rank": lora.rank, "targets": lora.targets, "dora": lora.dora, "parameters": size.parameters,
            "bf16": memory(Dtype::Bf16), "f32": memory(Dtype::F32),
        });
    }
    if args.tensors {
        report["tensors"] = sizes::tensors(config).into_iter().map(|(name, shape)| json!({ "name": name, "shape": shape })).collect();
    }
    report
}

fn text(args: &ParamsArgs, config: &Config, adapter: Option<&(Lora, AdapterSize)>) -> String {
    let count = sizes::parameters(config);
    let mut text = format!(
        "{}: {} layers, hidden {}, {} heads over {} kv heads of {}, vocab {}{}\n",
        args.model,
        config.layers,
        config.hidden,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.vocab,
        if config.tied { ", tied" } else { "" },
    );
    if let Some(moe) = &config.moe {
        text += &format!("experts          {} a sparse layer, {} a token\n", moe.experts, moe.experts_per_token);
    }
    text += &format!("parameters       {} ({})\n", count.total, units::count(count.total as f64));
    text += &format!("  non-embedding  {} ({})\n", count.non_embedding, units::count(count.non_embedding as f64));
    if config.moe.is_some() {
        text += &format!(
            "  activated      {} ({}) a token, without embedding and head\n",
            count.activated,
            units::count(count.activated as f64)
        );
    }
    if let Some((lora, size)) = adapter {
        let share = 100.0 * size.parameters as f64 / count.total as f64;
        let (kind, targets) = (if lora.dora { " with DoRA" } else { "" }, lora.targets.join(", "));
        text += &format!("adapter          {} ({share:.2}%) of rank {}{kind} on {targets}\n", size.parameters, lora.rank);
    }
    let flops = train_flops(config, args.context) / args.context.max(1) as f64;
    text += &format!("training         {}FLOP a token at length {}\n\n", units::count(flops), args.context);
    text += &format!("{:<54}{:>12}{:>12}\n", "memory", "bf16", "f32");
    let mut row = |name: String, bytes: &dyn Fn(&ParamsArgs, &Config, Dtype) -> u64| {
        let [bf16, f32] = [Dtype::Bf16, Dtype::F32].map(|dtype| units::bytes(bytes(args, config, dtype)));
        text += &format!("{name:<54}{bf16:>12}{f32:>12}\n");
    };
    row("load the weights".into(), &|_, config, dtype| sizes::load_bytes(config, dtype));
    row("train all weights with AdamW, activations not counted".into(), &|args, config, dtype| {
        sizes::train_bytes(config, dtype, args.moments())
    });
    row("more while a checkpoint is written, if there is room".into(), &|args, config, _| {
        sizes::checkpoint_copy_bytes(config, args.moments())
    });
    row(format!("serve {} texts of {} tokens", args.sequences, args.context), &|args, config, dtype| {
        sizes::serve_bytes(config, dtype, args.context, args.sequences)
    });
    if let Some((_, size)) = adapter {
        row("train the adapter, activations not counted".into(), &|args, config, dtype| adapted_bytes(args, config, size, dtype).0);
        row("serve as many with the adapter".into(), &|args, config, dtype| adapted_bytes(args, config, size, dtype).1);
    }
    row("cache of one token".into(), &|_, config, dtype| sizes::kv_cache_bytes_per_token(config, dtype));
    if args.tensors {
        text.push('\n');
        for (name, shape) in sizes::tensors(config) {
            text += &format!("{name:<60}{shape:?}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(model: &str) -> ParamsArgs {
        let model = model.into();
        ParamsArgs {
            model,
            context: 1000,
            sequences: 3,
            device: None,
            lora: None,
            targets: vec![],
            dora: false,
            moments: "f32".into(),
            tensors: true,
            json: false,
        }
    }

    #[test]
    fn an_adapter_is_trained_without_gradients_and_moments_of_its_base() {
        let config = find("0.5B").unwrap();
        let args = ParamsArgs { lora: Some(16), targets: vec!["q_proj".into(), "v_proj".into()], ..args("0.5B") };
        let adapter = adapter(&args, &config).unwrap();
        let text = text(&args, &config, adapter.as_ref());
        // 24 layers of 16 x (896 + 896 + 896 + 128).
        assert!(text.contains("adapter          1081344 (0.22%) of rank 16 on q_proj, v_proj"), "{text}");
        assert!(text.contains("train the adapter") && text.contains("serve as many with the adapter"), "{text}");
        let report = report(&args, &config, adapter.as_ref());
        // On the CPU rows of A are padded to 32.
        let elements = 24 * (2 * 32 * 896 + 16 * (896 + 128));
        assert_eq!(report["adapter"]["bf16"]["train_bytes"], 2 * 494_032_768u64 + 16 * elements);
        assert_eq!(report["adapter"]["bf16"]["serve_bytes"], 2 * 494_032_768u64 + 3 * 1000 * 12_288 + 2 * elements);
        let (parts, lines) = on_device(&args, &config, adapter.as_ref(), &Place::Host);
        assert!(lines.contains("a step of the adapter of 3000 tokens"), "{lines}");
        assert_eq!(parts["bf16"]["parts"]["moments of AdamW"], 8 * 1_081_344);
        let wrong = super::adapter(&ParamsArgs { targets: vec!["qkv".into()], ..args }, &config).unwrap_err().to_string();
        assert!(wrong.contains("q_proj") && wrong.contains("\"qkv\""), "{wrong}");
    }

    #[test]
    fn a_preset_and_a_folder_are_described() {
        let config = find("0.5B").unwrap();
        let text = text(&args("0.5B"), &config, None);
        assert!(text.contains("494032768 (494M)") && text.contains("model.norm.weight"), "{text}");
        let report = report(&args("0.5B"), &config, None);
        assert_eq!(report["parameters"]["total"], 494_032_768u64);
        assert_eq!(report["bf16"]["serve_bytes"], 2 * 494_032_768u64 + 3 * 1000 * 12_288);
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/moe_norm_true");
        let config = find(golden.to_str().unwrap()).unwrap();
        assert!(super::text(&args("x"), &config, None).contains("experts "));
    }

    #[test]
    fn the_parts_on_a_gpu_come_largest_first() {
        let (report, lines) = on_device(&args("0.5B"), &find("0.5B").unwrap(), None, &Place::Host);
        assert!(lines.contains("a step of 3000 tokens on a GPU in bf16"), "{lines}");
        assert!(lines.find("moments of AdamW").unwrap() < lines.find("weights").unwrap(), "{lines}");
        assert_eq!(report["bf16"]["parts"]["weights"], 2 * 494_032_768u64);
    }

    #[test]
    fn what_is_neither_is_an_error_that_names_the_presets() {
        let message = find("8B").unwrap_err().to_string();
        assert!(message.contains("0.5B") && message.contains("\"8B\""), "{message}");
    }
}
