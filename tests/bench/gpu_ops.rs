//! What the CUDA kernels reach: products and attention in TFLOP/s and as a share of the card's peak, the rest in GB/s of what
//! must be read and written at least. `cargo bench --bench gpu_ops`; beside it `python tests/bench/gpu_torch.py` for PyTorch.
//! Numbers are medians of runs timed by the device's own events, on random data.

use half::bf16;
use perilune::error::Result;
use perilune::kernels::cpu::adamw::AdamW;
use perilune::kernels::cpu::heads::Heads;
use perilune::kernels::cuda::adamw::{Parameter, adamw};
use perilune::kernels::cuda::attention::{Cache, Kernels, Plan, attention};
use perilune::kernels::cuda::attention_backward::{HopperTiles, Saved, attention_backward};
use perilune::kernels::cuda::device::Device;
use perilune::kernels::cuda::memory::DeviceBuffer;
use perilune::kernels::cuda::norm::Table;
use perilune::kernels::cuda::paged::{Decode, decode};
use perilune::kernels::cuda::product::{self, Residual, Weight};
use perilune::kernels::cuda::{embedding, logprobs, rms_norm, rope, swiglu};
use perilune::kernels::element::Element;
use std::sync::Arc;

/// Dense bf16 of an H100 or H200 SXM by its data sheet, TFLOP/s.
const PEAK_TFLOPS: f64 = 989.4;
/// Timed runs of each case.
const RUNS: usize = 12;

/// One table of figures.
type Group = fn(&Arc<Device>) -> Result<()>;

fn main() -> Result<()> {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("no figures: {error}");
            return Ok(());
        }
    };
    println!("{}, compute capability {:?}, {} multiprocessors", device.name, device.capability, device.multiprocessors);
    let only = std::env::args().nth(1).filter(|word| !word.starts_with('-')).unwrap_or_default();
    let groups: [(&str, Group); 5] =
        [("products", products), ("attention", attentions), ("kernels", kernels), ("decoding", decoding), ("rows", rows)];
    groups.iter().filter(|(name, _)| name.contains(&only)).try_for_each(|(_, group)| group(&device))
}

/// `count` random values, the same pattern again and again: uniform in [-1, 1).
fn filled<E: Element>(device: &Arc<Device>, count: usize) -> Result<DeviceBuffer<E>> {
    const PATTERN: usize = 1 << 20;
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        E::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    let pattern: Vec<E> = (0..PATTERN.min(count)).map(|_| next()).collect();
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        values.extend_from_slice(&pattern[..PATTERN.min(count - values.len())]);
    }
    DeviceBuffer::copy_of(device, "bench", &values)
}

fn scratch<E: Element>(device: &Arc<Device>, count: usize) -> Result<DeviceBuffer<E>> {
    DeviceBuffer::scratch(device, "bench", count)
}

/// Milliseconds of `work`: the median, after two runs that do not count.
fn median_ms(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    work()?;
    device.synchronize()?;
    let mut times = (0..RUNS).map(|_| device.time_ms(&mut work).map(f64::from)).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[RUNS / 2])
}

fn report_flops(what: &str, ms: f64, flops: f64) {
    let rate = flops / ms / 1e9;
    println!("{what:<58} {ms:9.3} ms {rate:8.1} TFLOP/s {:5.1} % of peak", 100.0 * rate / PEAK_TFLOPS);
}

fn report_bytes(what: &str, ms: f64, bytes: f64) {
    println!("{what:<58} {ms:9.3} ms {:8.0} GB/s", bytes / ms / 1e6);
}

fn products(device: &Arc<Device>) -> Result<()> {
    let tokens = 8192;
    for (name, n, k) in [
        ("0.5B qkv", 1152, 896),
        ("0.5B gate_up", 9728, 896),
        ("0.5B down", 896, 4864),
        ("7B qkv", 4608, 3584),
        ("7B gate_up", 37_888, 3584),
        ("7B down", 3584, 18_944),
        ("square", 8192, 8192),
    ] {
        let (x, w) = (filled::<bf16>(device, tokens * k)?, filled::<bf16>(device, n * k)?);
        let (dy, mut y) = (filled::<bf16>(device, tokens * n)?, scratch::<bf16>(device, tokens * n)?);
        let (mut dx, mut dw) = (scratch::<bf16>(device, tokens * k)?, scratch::<f32>(device, n * k)?);
        let weight = Weight { values: w.view(), outputs: n, inputs: k };
        let flops = 2.0 * tokens as f64 * n as f64 * k as f64;
        let ms = median_ms(device, || product::forward(device, y.view_mut(), x.view(), weight, None, Residual::None, None))?;
        report_flops(&format!("product {name} [{tokens}, {k}] x [{n}, {k}]"), ms, flops);
        let ms = median_ms(device, || product::input_gradient(device, dx.view_mut(), dy.view(), weight, false, None))?;
        report_flops(&format!("product {name} input gradient"), ms, flops);
        let ms = median_ms(device, || product::weight_gradient(device, dw.view_mut(), dy.view(), x.view(), (n, k), false, None))?;
        report_flops(&format!("product {name} weight gradient, f32"), ms, flops);
    }
    Ok(())
}

/// Shapes of attention: name, heads, documents, tokens of each.
const ATTENTIONS: [(&str, Heads, usize, usize); 3] = [
    ("0.5B 8 x 1024", Heads { heads: 14, kv_heads: 2, head_dim: 64 }, 8, 1024),
    ("7B 8 x 1024", Heads { heads: 28, kv_heads: 4, head_dim: 128 }, 8, 1024),
    ("7B 1 x 16384", Heads { heads: 28, kv_heads: 4, head_dim: 128 }, 1, 16_384),
];

fn attentions(device: &Arc<Device>) -> Result<()> {
    for (name, heads, documents, len) in ATTENTIONS {
        let kernels = Kernels::of(device, heads.head_dim);
        attention_both_ways(device, &format!("attention {name}, head_dim {}", heads.head_dim), heads, (documents, len), kernels)?;
    }
    Ok(())
}

/// Attention by other kernels of Hopper than those that are taken.
fn kernels(device: &Arc<Device>) -> Result<()> {
    if device.capability != (9, 0) {
        return Ok(());
    }
    for (name, heads, documents, len) in ATTENTIONS {
        let taken = HopperTiles::of(heads.head_dim);
        let queries = |query_groups, query_blocks| HopperTiles { query_groups, query_blocks, ..taken };
        let keys = |key_groups, key_splits| HopperTiles { key_groups, key_splits, ..taken };
        let tiles = match heads.head_dim {
            64 => vec![taken, queries(3, 1), queries(4, 1), keys(1, 2), keys(2, 1)],
            _ => vec![taken, queries(2, 1), keys(1, 2)],
        };
        let hopper = tiles.into_iter().map(|tiles| Kernels { forward_on_hopper: true, backward: Some(tiles) });
        for kernels in hopper.chain([Kernels { forward_on_hopper: false, backward: None }]) {
            println!("{name}: {kernels:?}");
            attention_both_ways(device, name, heads, (documents, len), kernels)?;
        }
    }
    Ok(())
}

fn attention_both_ways(device: &Arc<Device>, name: &str, heads: Heads, lens: (usize, usize), kernels: Kernels) -> Result<()> {
    let (documents, len) = lens;
    let (tokens, width) = (documents * len, heads.heads * heads.head_dim);
    let borders: Vec<i32> = (0..=documents).map(|d| (d * len) as i32).collect();
    let plan = Plan::packed_with(device, heads, &borders, (heads.head_dim as f32).powf(-0.5), None, kernels)?;
    let (qkv, d_o) = (filled::<bf16>(device, tokens * heads.width())?, filled::<bf16>(device, tokens * width)?);
    let (mut o, mut lse) = (scratch::<bf16>(device, tokens * width)?, scratch::<f32>(device, tokens * heads.heads)?);
    // Two products of half a square each.
    let flops = documents as f64 * 2.0 * (len * len) as f64 * width as f64;
    let ms = median_ms(device, || attention(device, &plan, qkv.view(), o.view_mut(), lse.view_mut()))?;
    report_flops(name, ms, flops);
    let (mut deltas, mut dqkv) = (scratch::<f32>(device, lse.len())?, scratch::<bf16>(device, qkv.len())?);
    let saved = Saved { qkv: qkv.view(), o: o.view(), lse: lse.view() };
    let ms = median_ms(device, || attention_backward(device, &plan, d_o.view(), saved, deltas.view_mut(), dqkv.view_mut()))?;
    report_flops(&format!("{name} backward"), ms, 2.5 * flops);
    Ok(())
}

fn decoding(device: &Arc<Device>) -> Result<()> {
    for (name, n, k) in [
        ("0.5B gate_up", 9728, 896),
        ("0.5B down", 896, 4864),
        ("7B gate_up", 37_888, 3584),
        ("7B down", 3584, 18_944),
        ("0.5B head", 151_936, 896),
    ] {
        // Several weights in turn, so that the cache does not hold them.
        let copies = (400_000_000 / (2 * n * k)).clamp(1, 24);
        let weights = (0..copies).map(|_| filled::<bf16>(device, n * k)).collect::<Result<Vec<_>>>()?;
        for rows in [1, 16] {
            let (x, mut y) = (filled::<bf16>(device, rows * k)?, scratch::<bf16>(device, rows * n)?);
            let ms = median_ms(device, || {
                weights.iter().try_for_each(|w| {
                    let weight = Weight { values: w.view(), outputs: n, inputs: k };
                    product::forward(device, y.view_mut(), x.view(), weight, None, Residual::None, None)
                })
            })?;
            report_bytes(&format!("product {name}, {rows} rows"), ms / copies as f64, 2.0 * n as f64 * k as f64);
        }
    }
    for (name, heads, kv_heads, head_dim, sequences, len) in
        [("0.5B", 14, 2, 64, 1, 4096), ("7B", 28, 4, 128, 1, 4096), ("7B", 28, 4, 128, 32, 4096)]
    {
        let heads = Heads { heads, kv_heads, head_dim };
        let width = len / 64;
        let size = sequences * len * kv_heads * head_dim;
        let (keys, values) = (filled::<bf16>(device, size)?, filled::<bf16>(device, size)?);
        let table = DeviceBuffer::copy_of(device, "bench", &(0..(sequences * width) as i32).collect::<Vec<_>>())?;
        let lengths = DeviceBuffer::copy_of(device, "bench", &vec![len as i32; sequences])?;
        let qkv = filled::<bf16>(device, sequences * heads.width())?;
        let (mut o, mut lse) =
            (scratch::<bf16>(device, sequences * heads.heads * head_dim)?, scratch::<f32>(device, sequences * heads.heads)?);
        let cache = Cache { keys: keys.view(), values: values.view(), block_table: table.view(), table_width: width };
        let settings = Decode { heads, scale: 0.1, window: None, length_max: len };
        let ms = median_ms(device, || decode(device, settings, qkv.view(), cache, lengths.view(), o.view_mut(), lse.view_mut()))?;
        report_bytes(&format!("decode attention {name}, {sequences} x {len} keys"), ms, 4.0 * size as f64);
    }
    Ok(())
}

fn rows(device: &Arc<Device>) -> Result<()> {
    let (tokens, hidden, inter, vocab) = (8192, 3584, 18_944, 151_936);
    let (x, mut y) = (filled::<bf16>(device, tokens * hidden)?, scratch::<bf16>(device, tokens * hidden)?);
    let (weight, mut inv) = (filled::<bf16>(device, hidden)?, scratch::<f32>(device, tokens)?);
    let size = 2.0 * (tokens * hidden) as f64;
    let ms = median_ms(device, || rms_norm::rms_norm(device, x.view(), None, weight.view(), 1e-6, y.view_mut(), inv.view_mut()))?;
    report_bytes("rms_norm [8192, 3584]", ms, 2.0 * size);
    let dy = filled::<bf16>(device, tokens * hidden)?;
    let ms =
        median_ms(device, || rms_norm::rms_norm_backward(device, x.view(), weight.view(), inv.view(), dy.view(), y.view_mut(), false))?;
    report_bytes("rms_norm backward", ms, 3.0 * size);
    let (gate_up, mut act) = (filled::<bf16>(device, tokens * 2 * inter)?, scratch::<bf16>(device, tokens * inter)?);
    let ms = median_ms(device, || swiglu::swiglu(device, gate_up.view(), inter, act.view_mut()))?;
    report_bytes("swiglu [8192, 2 x 18944]", ms, 6.0 * (tokens * inter) as f64);
    let heads = Heads { heads: 28, kv_heads: 4, head_dim: 128 };
    let mut qkv = filled::<bf16>(device, tokens * heads.width())?;
    let (cos, sin) = (filled::<f32>(device, tokens * 64)?, filled::<f32>(device, tokens * 64)?);
    let ms = median_ms(device, || rope::rope(device, qkv.view_mut(), heads, cos.view(), sin.view()))?;
    report_bytes("rope [8192, 32 heads of 128]", ms, 4.0 * (tokens * 32 * 128) as f64 + 8.0 * (tokens * 64) as f64);
    let rows = 2048;
    let mut logits = filled::<f32>(device, rows * vocab)?;
    let labels = DeviceBuffer::copy_of(device, "bench", &(0..rows as i32).collect::<Vec<_>>())?;
    let (mut lse, mut logprob, by) = (scratch::<f32>(device, rows)?, scratch::<f32>(device, rows)?, filled::<f32>(device, rows)?);
    let ms = median_ms(device, || logprobs::logprobs(device, logits.view(), labels.view(), lse.view_mut(), logprob.view_mut(), None))?;
    report_bytes("logprobs [2048, 151936]", ms, 4.0 * (rows * vocab) as f64);
    let ms = median_ms(device, || {
        let place = logprobs::Place::<f32>::InPlace(logits.view_mut());
        logprobs::gradient(device, place, labels.view(), lse.view(), by.view(), None)
    })?;
    report_bytes("logprobs gradient", ms, 8.0 * (rows * vocab) as f64);
    let ids: Vec<i32> = (0..tokens as i64).map(|i| (i * i * 7919 % vocab as i64) as i32).collect();
    let ids = DeviceBuffer::copy_of(device, "bench", &ids)?;
    let mut d_weight = DeviceBuffer::<f32>::zeroed(device, "bench", vocab * 896)?;
    let ms = median_ms(device, || embedding::embed_backward(device, x.part(..tokens * 896), ids.view(), 896, d_weight.view_mut()))?;
    report_bytes("embedding gradient, 8192 tokens of 896", ms, 10.0 * (tokens * 896) as f64);
    let count = 200_000_000;
    let (mut w, mut rest, g) =
        (filled::<bf16>(device, count)?, DeviceBuffer::<i16>::zeroed(device, "bench", count)?, filled::<f32>(device, count)?);
    let (mut m, mut v) = (DeviceBuffer::<f32>::zeroed(device, "bench", count)?, DeviceBuffer::<f32>::zeroed(device, "bench", count)?);
    let settings = AdamW { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, gradient_scale: 1.0 };
    let mut table = Table::default();
    let ms = median_ms(device, || {
        let (weight, rest) = (w.view_mut(), Some(rest.view_mut()));
        let parameter = Parameter { weight, rest, gradient: g.view(), m: m.view_mut(), v: v.view_mut(), decays: true };
        adamw(device, &mut table, &[parameter.line(device)], &settings, None)
    })?;
    report_bytes("adamw, 200 M parameters in bf16", ms, 28.0 * count as f64);
    Ok(())
}
