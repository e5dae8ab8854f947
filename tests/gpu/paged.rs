//! Attention over a paged cache: prefill and decoding have the bits of training.

use crate::attention::heads;
use crate::{Bench, assert_same, bench, uniform};
use half::bf16;
use perilune::kernels::cpu::heads::Heads;
use perilune::kernels::cuda::attention::{BLOCK, Cache, Plan, Span, attention};
use perilune::kernels::cuda::attention_step::{self, Step};
use perilune::kernels::cuda::memory::DeviceBuffer;
use perilune::kernels::cuda::paged::{self, Decode};
use perilune::kernels::element::Float;

/// One document per sequence, attended to in one go: the bits that everything else must have.
struct Document<E> {
    qkv: Vec<E>,
    o: Vec<E>,
    lse: Vec<f32>,
}

fn document<E: Float>(bench: &Bench, heads: Heads, window: Option<usize>, seed: u64, len: usize) -> Document<E> {
    let qkv = uniform::<E>(seed, len * heads.width());
    let plan = Plan::packed(&bench.device, heads, &[0, len as i32], SCALE, window).unwrap();
    let given = bench.upload(&qkv);
    let (mut o, mut lse) = (bench.poisoned(len * heads.heads * heads.head_dim), bench.poisoned(len * heads.heads));
    attention(&bench.device, &plan, given.view(), o.view_mut(), lse.view_mut()).unwrap();
    Document { qkv, o: o.to_vec().unwrap(), lse: lse.to_vec().unwrap() }
}

const SCALE: f32 = 0.3;

/// A cache whose blocks belong to the sequences in a scattered order.
struct Pages<E: Float> {
    keys: DeviceBuffer<E>,
    values: DeviceBuffer<E>,
    table: Vec<Vec<i32>>,
    table_on_device: DeviceBuffer<i32>,
}

impl<E: Float> Pages<E> {
    fn new(bench: &Bench, heads: Heads, lens: &[usize]) -> Self {
        let width = lens.iter().map(|len| len.div_ceil(BLOCK)).max().unwrap();
        let blocks = width * lens.len();
        // 13 and the number of blocks have no common factor in these tests.
        let table: Vec<Vec<i32>> = (0..lens.len()).map(|s| (0..width).map(|b| ((s * width + b) * 13 % blocks) as i32).collect()).collect();
        let mut seen = table.concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..blocks as i32).collect::<Vec<_>>());
        let size = blocks * BLOCK * heads.kv_heads * heads.head_dim;
        let table_on_device = bench.upload(&table.concat());
        Self { keys: bench.poisoned(size), values: bench.poisoned(size), table, table_on_device }
    }

    fn append(&mut self, bench: &Bench, heads: Heads, sequence: usize, span: Span, qkv: &[E]) {
        let (rows, slots) = (bench.upload(qkv), bench.upload(&paged::slots(span, &self.table[sequence])));
        // The queries and keys of these tests stand at their positions already: they are turned by nothing.
        let angles = span.count * heads.head_dim / 2;
        let (cos, sin, mut turned) = (bench.upload(&vec![1.0; angles]), bench.upload(&vec![0.0; angles]), bench.poisoned(qkv.len()));
        let (keys, values, angles) = (self.keys.view_mut(), self.values.view_mut(), (cos.view(), sin.view()));
        paged::append(&bench.device, heads, rows.view(), angles, slots.view(), turned.view_mut(), keys, values).unwrap();
        let queries =
            |qkv: &[E]| qkv.chunks(heads.width()).flat_map(|row| row[..heads.heads * heads.head_dim].to_vec()).collect::<Vec<E>>();
        assert_same("queries", &queries(&turned.to_vec().unwrap()), &queries(qkv));
    }

    fn cache(&self) -> Cache<'_, E> {
        let (keys, values) = (self.keys.view(), self.values.view());
        Cache { keys, values, block_table: self.table_on_device.view(), table_width: self.table[0].len() }
    }
}

/// - `idle`: a row without keys, which gives zeros
#[track_caller]
fn decodes<E: Float>(heads: Heads, lens: &[usize], window: Option<usize>, idle: Option<usize>) {
    let Some(bench) = bench() else { return };
    let width = heads.width();
    let documents: Vec<Document<E>> =
        lens.iter().enumerate().map(|(index, len)| document(bench, heads, window, index as u64 + 1, *len)).collect();
    let mut pages = Pages::new(bench, heads, lens);
    let mut last = Vec::new();
    for (sequence, (document, len)) in documents.iter().zip(lens).enumerate() {
        pages.append(bench, heads, sequence, Span { row: 0, cached: 0, count: *len }, &document.qkv);
        last.extend_from_slice(&document.qkv[(len - 1) * width..]);
    }
    let (o, lse) = bench.run(|device| {
        let qkv = bench.upload(&last);
        let length_of = |(row, len): (usize, &usize)| if idle == Some(row) { 0 } else { *len as i32 };
        let lengths = bench.upload(&lens.iter().enumerate().map(length_of).collect::<Vec<_>>());
        let (mut o, mut lse) = (bench.poisoned::<E>(lens.len() * heads.heads * heads.head_dim), bench.poisoned(lens.len() * heads.heads));
        let settings = Decode { heads, scale: SCALE, window, length_max: *lens.iter().max().unwrap() };
        paged::decode(device, settings, qkv.view(), pages.cache(), lengths.view(), o.view_mut(), lse.view_mut()).unwrap();
        (o.to_vec().unwrap(), lse.to_vec().unwrap())
    });
    let width = heads.heads * heads.head_dim;
    let mut want_o: Vec<E> = documents.iter().flat_map(|d| d.o[d.o.len() - width..].to_vec()).collect();
    let mut want_lse: Vec<f32> = documents.iter().flat_map(|d| d.lse[d.lse.len() - heads.heads..].to_vec()).collect();
    if let Some(row) = idle {
        want_o[row * width..][..width].fill(E::from_f32(0.0));
        want_lse[row * heads.heads..][..heads.heads].fill(0.0);
    }
    assert_same("lse", &lse, &want_lse);
    assert_same("o", &o, &want_o);
}

/// The kernel of captured steps of few texts against those that it is made of.
fn a_step_has_the_bits_of_its_parts(heads: Heads, lens: &[usize], window: Option<usize>) {
    let Some(bench) = bench() else { return };
    let (width, half) = (heads.width(), heads.head_dim / 2);
    let mut pages = Pages::<bf16>::new(bench, heads, &lens.iter().map(|len| (*len).max(1)).collect::<Vec<_>>());
    for (sequence, len) in lens.iter().enumerate().filter(|(_, len)| **len > 1) {
        let earlier = uniform::<bf16>(sequence as u64, (len - 1) * width);
        pages.append(bench, heads, sequence, Span { row: 0, cached: 0, count: len - 1 }, &earlier);
    }
    let slot = |(sequence, len): (usize, &usize)| match len {
        0 => -1,
        len => paged::slots(Span { row: 0, cached: len - 1, count: 1 }, &pages.table[sequence])[0],
    };
    let slots = bench.upload(&lens.iter().enumerate().map(slot).collect::<Vec<_>>());
    let qkv = bench.upload(&uniform::<bf16>(50, lens.len() * width));
    let (cos, sin) = (bench.upload(&uniform::<f32>(51, lens.len() * half)), bench.upload(&uniform::<f32>(52, lens.len() * half)));
    let lengths = bench.upload(&lens.iter().map(|len| *len as i32).collect::<Vec<_>>());
    let settings = Decode { heads, scale: SCALE, window, length_max: *lens.iter().max().unwrap() };
    let run = |whole: bool| {
        bench.run(|device| {
            let copy = |from: &DeviceBuffer<bf16>| bench.upload(&from.to_vec().unwrap());
            let (mut keys, mut values) = (copy(&pages.keys), copy(&pages.values));
            let (mut o, mut lse) =
                (bench.poisoned::<bf16>(lens.len() * heads.heads * heads.head_dim), bench.poisoned::<f32>(lens.len() * heads.heads));
            let (block_table, table_width) = (pages.table_on_device.view(), pages.table[0].len());
            if whole {
                let (cos, sin, slots, lengths) = (cos.view(), sin.view(), slots.view(), lengths.view());
                let step = Step { cos, sin, slots, block_table, table_width, lengths };
                let (k, v) = (keys.view_mut(), values.view_mut());
                attention_step::attend(device, settings, qkv.view(), step, k, v, o.view_mut(), lse.view_mut()).unwrap();
            } else {
                let mut turned = bench.poisoned::<bf16>(qkv.len());
                let (k, v, angles) = (keys.view_mut(), values.view_mut(), (cos.view(), sin.view()));
                paged::append(device, heads, qkv.view(), angles, slots.view(), turned.view_mut(), k, v).unwrap();
                let cache = Cache { keys: keys.view(), values: values.view(), block_table, table_width };
                paged::decode(device, settings, turned.view(), cache, lengths.view(), o.view_mut(), lse.view_mut()).unwrap();
            }
            // Bits, since places of the cache that nobody wrote are NaN.
            let bits = |buffer: DeviceBuffer<bf16>| buffer.to_vec().unwrap().into_iter().map(bf16::to_bits).collect::<Vec<_>>();
            (bits(o), lse.to_vec().unwrap(), bits(keys), bits(values))
        })
    };
    assert!(run(true) == run(false), "{heads:?}, {lens:?}, {window:?}");
}

#[test]
fn a_step_of_few_texts_has_the_bits_of_its_parts() {
    // A new key that begins a block, one alone, an idle row.
    a_step_has_the_bits_of_its_parts(heads(4, 2, 64), &[65, 1, 64, 0], None);
    a_step_has_the_bits_of_its_parts(heads(3, 1, 10), &[70, 3, 90], Some(40));
    // More heads than 16 rows of a tile.
    a_step_has_the_bits_of_its_parts(heads(18, 1, 16), &[40], None);
    // Two spans, of which the new key begins the second; more blocks than there is room for at once.
    a_step_has_the_bits_of_its_parts(heads(1, 1, 16), &[513, 0, 600], Some(530));
    a_step_has_the_bits_of_its_parts(heads(2, 1, 128), &[500], None);
}

fn decoding_has_the_bits_of_training<E: Float>(heads: Heads, lens: &[usize], window: Option<usize>) {
    decodes::<E>(heads, lens, window, None);
}

#[test]
fn decoding_in_bf16_has_the_bits_of_training() {
    decoding_has_the_bits_of_training::<bf16>(heads(4, 2, 64), &[1, 64, 65], None);
    decoding_has_the_bits_of_training::<bf16>(heads(3, 1, 10), &[70, 3, 90], Some(40));
    // More heads than 16 rows of a tile, more keys than a span of 512, a window that begins inside a span.
    decoding_has_the_bits_of_training::<bf16>(heads(18, 1, 16), &[40], None);
    decoding_has_the_bits_of_training::<bf16>(heads(1, 1, 16), &[1100, 513], None);
    decoding_has_the_bits_of_training::<bf16>(heads(1, 1, 16), &[1100], Some(530));
    // Training takes Hopper's kernel here, decoding the one for all.
    decoding_has_the_bits_of_training::<bf16>(heads(2, 1, 128), &[600], None);
}

#[test]
fn rows_without_keys_give_zeros_and_touch_no_other() {
    // One span of keys, whose block gives the result, and two, which are merged.
    decodes::<bf16>(heads(4, 2, 64), &[70, 1, 3], None, Some(1));
    decodes::<bf16>(heads(2, 1, 16), &[600, 1, 3], None, Some(2));
}

/// Keys and values of a row without a place go nowhere.
#[test]
fn rows_without_a_place_leave_the_cache_as_it_is() {
    let Some(bench) = bench() else { return };
    let heads = heads(2, 1, 16);
    let (qkv, slots) = (bench.upload(&uniform::<bf16>(1, 3 * heads.width())), bench.upload(&[5, -1, 63]));
    let (cos, sin) = (bench.upload(&[1.0f32; 3 * 8]), bench.upload(&[0.0f32; 3 * 8]));
    let (keys, _) = bench.run(|device| {
        let mut turned = bench.poisoned::<bf16>(qkv.len());
        let mut cache = [0, 1].map(|_| DeviceBuffer::<bf16>::zeroed(device, "test", BLOCK * 16).unwrap());
        let [keys, values] = cache.each_mut().map(DeviceBuffer::view_mut);
        paged::append(device, heads, qkv.view(), (cos.view(), sin.view()), slots.view(), turned.view_mut(), keys, values).unwrap();
        let [keys, values] = cache.map(|part| part.to_vec().unwrap());
        (keys, values)
    });
    let written: Vec<usize> =
        keys.chunks(16).enumerate().filter(|(_, key)| key.iter().any(|v| v.to_f32() != 0.0)).map(|(at, _)| at).collect();
    assert_eq!(written, [5, 63]);
}

#[test]
fn decoding_in_f32_has_the_bits_of_training() {
    decoding_has_the_bits_of_training::<f32>(heads(4, 2, 8), &[1, 64, 65], None);
    decoding_has_the_bits_of_training::<f32>(heads(2, 1, 64), &[70], Some(33));
}

fn prefill_has_the_bits_of_training<E: Float>(heads: Heads, len: usize, cuts: &[usize], window: Option<usize>) {
    let Some(bench) = bench() else { return };
    let (width, o_width) = (heads.width(), heads.heads * heads.head_dim);
    let whole = document::<E>(bench, heads, window, 7, len);
    let mut pages = Pages::new(bench, heads, &[len]);
    let mut start = 0;
    for end in cuts.iter().copied().chain([len]) {
        let span = Span { row: 0, cached: start, count: end - start };
        let part = &whole.qkv[start * width..end * width];
        pages.append(bench, heads, 0, span, part);
        let (o, lse) = bench.run(|device| {
            let plan = Plan::of_spans(device, heads, &[span], SCALE, window).unwrap();
            let qkv = bench.upload(part);
            let (mut o, mut lse) = (bench.poisoned::<E>(span.count * o_width), bench.poisoned(span.count * heads.heads));
            paged::prefill(device, &plan, qkv.view(), pages.cache(), o.view_mut(), lse.view_mut()).unwrap();
            (o.to_vec().unwrap(), lse.to_vec().unwrap())
        });
        assert_same("lse", &lse, &whole.lse[start * heads.heads..end * heads.heads]);
        assert_same("o", &o, &whole.o[start * o_width..end * o_width]);
        start = end;
    }
}

#[test]
fn prefill_in_pieces_has_the_bits_of_training() {
    prefill_has_the_bits_of_training::<bf16>(heads(2, 1, 64), 150, &[1, 60, 129], None);
    prefill_has_the_bits_of_training::<bf16>(heads(2, 2, 16), 100, &[33], Some(20));
    prefill_has_the_bits_of_training::<bf16>(heads(1, 1, 16), 700, &[500, 640], None);
    prefill_has_the_bits_of_training::<f32>(heads(2, 1, 16), 70, &[33], None);
}
