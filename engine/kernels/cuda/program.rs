//! The CUDA C++ sources of this folder, and which of their variants exist: one program is compiled for each element type
//! and head width that is used, with the numbers as macros, so that loops unroll.

use crate::kernels::element::{Dtype, Float};
use std::sync::Arc;

/// What all sources include.
pub const HEADERS: [(&str, &str); 6] = [
    ("prelude.cuh", include_str!("prelude.cuh")),
    ("attention_core.cuh", include_str!("attention_core.cuh")),
    ("attention_decode.cuh", include_str!("attention_decode.cuh")),
    ("hopper.cuh", include_str!("hopper.cuh")),
    ("product_tile.cuh", include_str!("product_tile.cuh")),
    ("rms_norm.cuh", include_str!("rms_norm.cuh")),
];

/// A source file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    Adamw,
    Attention,
    AttentionBackward,
    /// For compute capability 9.0 alone.
    AttentionBackwardHopper,
    /// For compute capability 9.0 alone.
    AttentionHopper,
    AttentionPaged,
    AttentionPlain,
    AttentionStep,
    Dora,
    Elements,
    Embedding,
    Int8,
    Logprobs,
    Muon,
    Norm,
    Product,
    /// From compute capability 9.0 on.
    ProductFew,
    /// For compute capability 9.0 alone.
    ProductHopper,
    ProductNarrow,
    ProductPlain,
    RmsNorm,
    Rope,
    Route,
    Sample,
    Swiglu,
    /// Written by generic.rs.
    Generated(Arc<str>),
}

impl Program {
    /// Its name in messages, and its text.
    pub fn source(&self) -> (&'static str, &str) {
        match self {
            Self::Adamw => ("adamw.cu", include_str!("adamw.cu")),
            Self::Attention => ("attention.cu", include_str!("attention.cu")),
            Self::AttentionBackward => ("attention_backward.cu", include_str!("attention_backward.cu")),
            Self::AttentionBackwardHopper => ("attention_backward_hopper.cu", include_str!("attention_backward_hopper.cu")),
            Self::AttentionHopper => ("attention_hopper.cu", include_str!("attention_hopper.cu")),
            Self::AttentionPaged => ("attention_paged.cu", include_str!("attention_paged.cu")),
            Self::AttentionPlain => ("attention_plain.cu", include_str!("attention_plain.cu")),
            Self::AttentionStep => ("attention_step.cu", include_str!("attention_step.cu")),
            Self::Dora => ("dora.cu", include_str!("dora.cu")),
            Self::Elements => ("elements.cu", include_str!("elements.cu")),
            Self::Embedding => ("embedding.cu", include_str!("embedding.cu")),
            Self::Int8 => ("int8.cu", include_str!("int8.cu")),
            Self::Logprobs => ("logprobs.cu", include_str!("logprobs.cu")),
            Self::Muon => ("muon.cu", include_str!("muon.cu")),
            Self::Norm => ("norm.cu", include_str!("norm.cu")),
            Self::Product => ("product.cu", include_str!("product.cu")),
            Self::ProductFew => ("product_few.cu", include_str!("product_few.cu")),
            Self::ProductHopper => ("product_hopper.cu", include_str!("product_hopper.cu")),
            Self::ProductNarrow => ("product_narrow.cu", include_str!("product_narrow.cu")),
            Self::ProductPlain => ("product_plain.cu", include_str!("product_plain.cu")),
            Self::RmsNorm => ("rms_norm.cu", include_str!("rms_norm.cu")),
            Self::Rope => ("rope.cu", include_str!("rope.cu")),
            Self::Route => ("route.cu", include_str!("route.cu")),
            Self::Sample => ("sample.cu", include_str!("sample.cu")),
            Self::Swiglu => ("swiglu.cu", include_str!("swiglu.cu")),
            Self::Generated(text) => ("generated.cu", text),
        }
    }

    /// Whether products and sums may be contracted to one rounding. Where the CPU's bits are wanted they may not.
    fn contracts(&self) -> bool {
        !matches!(
            self,
            Self::Adamw
                | Self::Dora
                | Self::Elements
                | Self::Embedding
                | Self::Int8
                | Self::Muon
                | Self::Rope
                | Self::Route
                | Self::Sample
                | Self::Generated(_)
        )
    }
}

/// Most macros of a variant.
const MACROS_MAX: usize = 7;

/// A program with the values of its macros.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    pub program: Program,
    macros: [Option<(&'static str, u32)>; MACROS_MAX],
}

impl Variant {
    /// A program for elements of `dtype`: f32 or bf16.
    pub fn new(program: Program, dtype: Dtype) -> Self {
        assert!(matches!(dtype, Dtype::F32 | Dtype::Bf16), "kernels compute in f32 or bf16, not {dtype}");
        Self { program, macros: [None; MACROS_MAX] }.with("ELEMENT_BF16", u32::from(dtype == Dtype::Bf16))
    }

    /// A program for elements of `E`.
    pub fn of<E: Float>(program: Program) -> Self {
        Self::new(program, E::DTYPE)
    }

    /// With one more macro.
    pub fn with(mut self, name: &'static str, value: u32) -> Self {
        let place = self.macros.iter().position(Option::is_none).expect("a variant has few macros");
        self.macros[place] = Some((name, value));
        self
    }

    /// The options for the compiler, the architecture not among them.
    pub fn options(&self) -> Vec<String> {
        let mut options = vec!["--std=c++17".to_owned(), format!("--fmad={}", self.program.contracts())];
        options.extend(self.macros.iter().flatten().map(|(name, value)| format!("-D{name}={value}")));
        options
    }

    /// "attention.cu ELEMENT_BF16=1 HEAD_DIM=64".
    pub fn title(&self) -> String {
        let macros = self.macros.iter().flatten().map(|(name, value)| format!(" {name}={value}"));
        self.program.source().0.to_owned() + &macros.collect::<String>()
    }
}

/// The programs that launchers ask for on a device of this capability, with the head widths of Qwen2.5; for tests that compile
/// all of them. Of the products' many variants each loop is there: each order of the operands in each tile, each grouping.
pub fn variants(capability: (i32, i32)) -> Vec<Variant> {
    use Program::*;
    let (plain, wide) = (Dtype::F32, Dtype::Bf16);
    let mut all = Vec::new();
    for program in [Adamw, Elements, Embedding, Logprobs, Muon, Norm, RmsNorm, Rope, Route, Swiglu] {
        all.extend([plain, wide].map(|dtype| Variant::new(program.clone(), dtype)));
    }
    all.push(Variant::new(Sample, plain));
    all.extend([plain, wide].into_iter().flat_map(super::int8::variants));
    if capability >= (9, 0) {
        all.extend(super::product_few::variants());
    }
    all.extend([(plain, 1), (wide, 0), (wide, 1)].map(|(dtype, out)| Variant::new(Dora, dtype).with("OUT_F32", out)));
    for head_dim in [64, 128] {
        for paged in [0, 1] {
            let variant = |program, dtype| Variant::new(program, dtype).with("HEAD_DIM", head_dim).with("PAGED", paged);
            all.push(variant(Attention, wide).with("ATOMS", head_dim / 64));
            all.push(variant(AttentionPlain, plain));
            if capability == (9, 0) {
                all.push(variant(AttentionHopper, wide));
            }
        }
        if capability == (9, 0) {
            all.push(super::attention_backward::HopperTiles::of(head_dim as usize).variant(head_dim as usize));
        }
        all.extend(
            [AttentionBackward, AttentionPaged, AttentionStep].map(|program| Variant::new(program, wide).with("HEAD_DIM", head_dim)),
        );
    }
    // (a strided, b strided, grouped): forward, gradient of the input, gradient of the weight.
    for (a, b, grouped) in [(0, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 1, 2)] {
        let operands = |variant: Variant| variant.with("A_STRIDED", a).with("B_STRIDED", b).with("GROUPED", grouped);
        all.push(operands(Variant::new(ProductPlain, plain)));
        let product = |program| operands(Variant::new(program, wide)).with("OUT_F32", a);
        let tiled = |program, rows, columns| product(program).with("TILE_ROWS", rows).with("TILE_COLUMNS", columns);
        all.extend([(16, 32), (16, 64), (64, 64), (128, 128)].map(|(rows, columns)| tiled(Product, rows, columns)));
        if capability == (9, 0) {
            all.extend([64, 128, 192, 224, 256].map(|columns| tiled(ProductHopper, 128, columns)));
        }
        if (a, b, grouped) == (0, 0, 0) {
            all.push(tiled(ProductNarrow, 8, 8));
        }
    }
    all
}
