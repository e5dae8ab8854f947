//! The rotary frequencies of a model: plain, linear, llama3 and YaRN. Makes the table of frequencies once; turning heads
//! by them is a kernel's work, and Dual Chunk Attention has its own positions.
//! Source: qwen2.5.md section 5.1 (transformers' rope utilities; YaRN, arXiv 2309.00071).

use super::fields::Fields;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::f64::consts::TAU;

/// How frequencies are stretched beyond the trained length; `rope_theta` stands in the configuration itself.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// theta^(-2i / head_dim), as every published Qwen2.5 has it.
    Default,
    /// All frequencies divided by `factor`.
    Linear { factor: f64 },
    /// Long waves divided by `factor`, short ones kept, those between mixed. `original` is in tokens.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original: usize },
    /// YaRN: as above with a ramp over dimensions, and a temperature on attention.
    Yarn(Yarn),
}

/// The parameters of YaRN. It acts at every length once it is on (trap 11 of the reference).
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Stretch: trained length times this is the new length.
    pub factor: f64,
    /// Trained length, tokens.
    pub original: usize,
    /// Turns within `original` above which a dimension is kept; 32.
    pub beta_fast: f64,
    /// Turns within `original` below which a dimension is stretched in full; 1.
    pub beta_slow: f64,
    /// Whether the ramp's ends are rounded to whole dimensions; true.
    pub truncate: bool,
    /// Overrides the factor on cos and sin.
    pub attention_factor: Option<f64>,
    pub mscale: Option<f64>,
    pub mscale_all_dim: Option<f64>,
}

impl Yarn {
    /// YaRN with the defaults of transformers.
    pub fn new(factor: f64, original: usize) -> Self {
        Self {
            factor,
            original,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: None,
            mscale: None,
            mscale_all_dim: None,
        }
    }

    /// What cos and sin are multiplied by; scores grow by its square.
    fn attention_scaling(&self) -> f64 {
        let mscale = |by: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * by * self.factor.ln() + 1.0 };
        match (self.attention_factor, self.mscale, self.mscale_all_dim) {
            (Some(given), ..) => given,
            // A zero counts as absent, as it does in transformers.
            (None, Some(one), Some(all)) if one != 0.0 && all != 0.0 => mscale(one) / mscale(all),
            _ => mscale(1.0),
        }
    }

    /// The dimensions, as fractions, between which the ramp rises.
    fn ramp(&self, theta: f64, head_dim: usize) -> (f64, f64) {
        let dimension = |turns: f64| head_dim as f64 * (self.original as f64 / (TAU * turns)).ln() / (2.0 * theta.ln());
        let (low, high) = (dimension(self.beta_fast), dimension(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        (low, if low == high { high + 0.001 } else { high })
    }
}

impl RopeScaling {
    /// Reads `rope_scaling` (transformers 4) or `rope_parameters` (5), with `rope_theta` wherever it stands.
    ///
    /// - returns theta and the scaling
    ///
    /// Errors: [`Error::Format`] for a wrong value; [`Error::Unsupported`] for a type that depends on the length in use.
    pub fn parse(config: &Fields, max_positions: usize) -> Result<(f64, Self)> {
        // A theta of 1 or less would give no waves at all, and YaRN divides by its logarithm.
        let theta_range = 1.0 + f64::EPSILON..=1e15;
        let top = config.optional_number("rope_theta", theta_range.clone())?;
        let newer = config.object("rope_parameters", "rope_parameters.")?;
        let theta = match (&newer, top) {
            (Some(newer), top) => match (newer.optional_number("rope_theta", theta_range)?, top) {
                (Some(inner), Some(outer)) if inner != outer => {
                    return Err(newer.fault("rope_theta", format!("{outer}, as rope_theta says"), inner.to_string()));
                }
                (inner, outer) => inner.or(outer),
            },
            (None, top) => top,
        };
        let scaling = match newer {
            Some(newer) => Some(newer),
            None => config.object("rope_scaling", "rope_scaling.")?,
        };
        let scaling = scaling.map_or(Ok(Self::Default), |fields| Self::parse_scaling(&fields, max_positions))?;
        Ok((theta.unwrap_or(10_000.0), scaling))
    }

    /// Reads the object itself, for example `{"rope_type": "yarn", "factor": 4.0}`. Errors: as [`Self::parse`].
    pub fn parse_scaling(fields: &Fields, max_positions: usize) -> Result<Self> {
        let kind = match (fields.text("rope_type")?, fields.text("type")?) {
            (Some(newer), Some(older)) if newer != older => {
                return Err(fields.fault("type", format!("{newer:?}, as rope_type says"), format!("{older:?}")));
            }
            (newer, older) => newer.or(older),
        };
        let factor = || fields.optional_number("factor", 1.0..=1e6);
        let required = |key: &str, value: Option<f64>| value.ok_or_else(|| fields.fault(key, "a number", "no such key"));
        let original = |default| fields.optional_count("original_max_position_embeddings", 1..=1 << 30).map(|given| given.or(default));
        match kind {
            Some("default") => Ok(Self::Default),
            Some("linear") => Ok(Self::Linear { factor: required("factor", factor()?)? }),
            Some("llama3") => {
                let bound = |key: &str| required(key, fields.optional_number(key, 1e-3..=1e6)?);
                let (low_freq_factor, high_freq_factor) = (bound("low_freq_factor")?, bound("high_freq_factor")?);
                if low_freq_factor >= high_freq_factor {
                    return Err(fields.fault("high_freq_factor", format!("more than {low_freq_factor}"), high_freq_factor.to_string()));
                }
                let original = original(None)?.ok_or_else(|| fields.wrong("original_max_position_embeddings", "a whole number"))?;
                Ok(Self::Llama3 { factor: required("factor", factor()?)?, low_freq_factor, high_freq_factor, original })
            }
            Some("yarn") => {
                let original = original(Some(max_positions))?.expect("there is a default");
                let factor = factor()?.unwrap_or((max_positions as f64 / original as f64).max(1.0));
                // 0 counts as absent, as it does in transformers.
                let beta = |key: &str, default: f64| {
                    Ok::<_, Error>(fields.optional_number(key, 0.0..=1e6)?.filter(|beta| *beta != 0.0).unwrap_or(default))
                };
                let (beta_fast, beta_slow) = (beta("beta_fast", 32.0)?, beta("beta_slow", 1.0)?);
                if beta_fast < beta_slow {
                    return Err(fields.fault("beta_fast", format!("at least beta_slow, {beta_slow}"), beta_fast.to_string()));
                }
                Ok(Self::Yarn(Yarn {
                    factor,
                    original,
                    beta_fast,
                    beta_slow,
                    truncate: fields.flag("truncate", true)?,
                    attention_factor: fields.optional_number("attention_factor", 1e-3..=1e3)?,
                    mscale: fields.optional_number("mscale", 0.0..=1e3)?,
                    mscale_all_dim: fields.optional_number("mscale_all_dim", 0.0..=1e3)?,
                }))
            }
            Some(kind @ ("dynamic" | "longrope" | "su")) => Err(Error::Unsupported {
                what: format!("{}: rope type {kind:?}, whose frequencies change with the length of the text,", fields.path.display()),
                remedy: "use {\"rope_type\": \"yarn\", \"factor\": ...}, which Qwen2.5 is published with, or null".into(),
            }),
            Some(_) => Err(fields.wrong(if fields.get("rope_type").is_some() { "rope_type" } else { "type" }, KINDS)),
            None => Err(fields.wrong("rope_type", KINDS)),
        }
    }

    /// The object for `rope_scaling` in a `config.json` of transformers 4; null for the default. It carries the type
    /// under both its names, since readers older than 4.43 know only `type`.
    pub fn to_json(&self) -> Value {
        let kind = |kind: &str| Map::from_iter([("rope_type".to_owned(), json!(kind)), ("type".to_owned(), json!(kind))]);
        let mut object = match self {
            Self::Default => return Value::Null,
            Self::Linear { .. } => kind("linear"),
            Self::Llama3 { .. } => kind("llama3"),
            Self::Yarn(_) => kind("yarn"),
        };
        let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
        match self {
            Self::Default => unreachable!("returned above"),
            Self::Linear { factor } => {
                set("factor", json!(factor));
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                set("factor", json!(factor));
                set("low_freq_factor", json!(low_freq_factor));
                set("high_freq_factor", json!(high_freq_factor));
                set("original_max_position_embeddings", json!(original));
            }
            Self::Yarn(yarn) => {
                set("factor", json!(yarn.factor));
                set("original_max_position_embeddings", json!(yarn.original));
                let plain = Yarn::new(yarn.factor, yarn.original);
                if yarn.beta_fast != plain.beta_fast || yarn.beta_slow != plain.beta_slow {
                    set("beta_fast", json!(yarn.beta_fast));
                    set("beta_slow", json!(yarn.beta_slow));
                }
                if !yarn.truncate {
                    set("truncate", json!(false));
                }
                for (key, value) in
                    [("attention_factor", yarn.attention_factor), ("mscale", yarn.mscale), ("mscale_all_dim", yarn.mscale_all_dim)]
                {
                    if let Some(value) = value {
                        set(key, json!(value));
                    }
                }
            }
        }
        Value::Object(object)
    }

    /// The frequencies, radians a position, and the factor on cos and sin.
    ///
    /// - returns `[head_dim / 2]`, f32, in the order of operations of transformers, which is f32 throughout
    ///
    /// Panics if `head_dim` is odd: a configuration is checked when it is read.
    pub fn inv_freq(&self, theta: f64, head_dim: usize) -> (Vec<f32>, f32) {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "head_dim {head_dim} does not make pairs");
        let half = head_dim / 2;
        let power = |i: usize| (theta as f32).powf((2 * i) as f32 / head_dim as f32);
        let plain = |i: usize| 1.0 / power(i);
        match self {
            Self::Default => ((0..half).map(plain).collect(), 1.0),
            Self::Linear { factor } => ((0..half).map(|i| plain(i) / *factor as f32).collect(), 1.0),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let (factor, low, high, original) = (*factor as f32, *low_freq_factor as f32, *high_freq_factor as f32, *original as f32);
                let stretched = |i: usize| {
                    let inv_freq = plain(i);
                    let wavelength = TAU as f32 / inv_freq;
                    if wavelength > original / low {
                        inv_freq / factor
                    } else if wavelength < original / high {
                        inv_freq
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
                    }
                };
                ((0..half).map(stretched).collect(), 1.0)
            }
            Self::Yarn(yarn) => {
                let (low, high) = yarn.ramp(theta, head_dim);
                let mixed = |i: usize| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    let stretched = 1.0 / (yarn.factor as f32 * power(i));
                    stretched * (1.0 - kept) + plain(i) * kept
                };
                ((0..half).map(mixed).collect(), yarn.attention_scaling() as f32)
            }
        }
    }
}

const KINDS: &str = "one of \"default\", \"linear\", \"llama3\", \"yarn\"";

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn assert_near(got: f32, want: f64, what: &str) {
        // Two f32 roundings, of the power and of the quotient.
        assert!((f64::from(got) - want).abs() <= want.abs() * 4e-7, "{what}: {got} against {want}");
    }

    #[test]
    fn yarn_gives_the_reference_table() {
        // qwen2.5.md section 5.1, computed with transformers 4.57.1.
        let yarn = RopeScaling::Yarn(Yarn::new(4.0, 32_768));
        let (table, scaling) = yarn.inv_freq(1e6, 128);
        assert_near(scaling, 1.138_629_436_111_989, "attention_scaling");
        for (i, want) in [
            (23, 6.978_305_988e-3),
            (24, 5.375_321_489e-3),
            (31, 8.029_597_811e-4),
            (39, 6.490_394_298e-5),
            (40, 4.445_698_505e-5),
            (63, 3.102_344_408e-7),
        ] {
            assert_near(table[i], want, &format!("head_dim 128, {i}"));
        }
        let (plain, one) = RopeScaling::Default.inv_freq(1e6, 128);
        assert_eq!((one, plain[23]), (1.0, table[23]));
        for (i, ratio) in [(24, 0.955_882), (31, 0.647_059), (39, 0.294_118), (40, 0.25)] {
            assert!((table[i] / plain[i] - ratio).abs() < 1e-6, "ratio at {i}");
        }
        let (table, _) = yarn.inv_freq(1e6, 64);
        for (i, want) in [(10, 1.333_521_493e-2), (20, 4.445_698_505e-5), (31, 3.849_816_324e-7)] {
            assert_near(table[i], want, &format!("head_dim 64, {i}"));
        }
        // The tiny model of section 7.4.
        let (table, scaling) = RopeScaling::Yarn(Yarn::new(4.0, 16)).inv_freq(1e4, 8);
        assert_near(scaling, 1.138_629_4, "tiny");
        for (got, want) in table.iter().zip([1.0, 0.025, 0.0025, 0.00025]) {
            assert_near(*got, want, "tiny");
        }
    }

    #[test]
    fn yarn_ramps_begin_and_end_where_the_reference_says() {
        let mut yarn = Yarn::new(4.0, 32_768);
        assert_eq!(yarn.ramp(1e6, 128), (23.0, 40.0));
        assert_eq!(yarn.ramp(1e6, 64), (11.0, 20.0));
        yarn.truncate = false;
        let (low, high) = yarn.ramp(1e6, 128);
        assert!((low - 23.595_95).abs() < 1e-5 && (high - 39.650_88).abs() < 1e-5, "{low} {high}");
    }

    #[test]
    fn yarn_temperature_follows_its_three_rules() {
        let mut yarn = Yarn::new(4.0, 32);
        yarn.mscale = Some(0.707);
        // Only one of the two is set: the plain rule.
        assert!((yarn.attention_scaling() - 1.138_629_436_111_989).abs() < 1e-15);
        yarn.mscale_all_dim = Some(1.0);
        // (0.0707 ln 4 + 1) / (0.1 ln 4 + 1) = 1.0980110 / 1.1386294
        assert!((yarn.attention_scaling() - 0.964_326_9).abs() < 1e-7, "{}", yarn.attention_scaling());
        yarn.attention_factor = Some(1.25);
        assert_eq!(yarn.attention_scaling(), 1.25);
        assert_eq!(Yarn::new(1.0, 32).attention_scaling(), 1.0);
    }

    #[test]
    fn linear_and_llama3_keep_or_divide() {
        let (plain, _) = RopeScaling::Default.inv_freq(1e4, 8);
        let (linear, one) = RopeScaling::Linear { factor: 8.0 }.inv_freq(1e4, 8);
        assert!(linear.iter().zip(&plain).all(|(a, b)| *a == *b / 8.0) && one == 1.0);
        // Wavelengths are 2 pi times 1, 10, 100, 1000. With 64 original positions and factors 0.5 and 4 the bounds are 128
        // and 16: the first is kept, the last two are divided, and 62.83 lies between with
        // smooth = (64 / 62.8319 - 0.5) / 3.5 = 0.1481689: 0.1 * ((1 - 0.1481689) / 8 + 0.1481689) = 0.0254648.
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 0.5, high_freq_factor: 4.0, original: 64 };
        let (table, one) = llama3.inv_freq(1e4, 8);
        for (got, want) in table.iter().zip([1.0, 0.025_464_777, 0.00125, 0.000125]) {
            assert!((f64::from(*got) - want).abs() <= want * 1e-6, "{got} against {want}");
        }
        assert_eq!(one, 1.0);
    }

    #[test]
    fn every_kind_survives_writing_and_reading() {
        let mut odd = Yarn::new(2.5, 77);
        (odd.beta_fast, odd.truncate, odd.attention_factor, odd.mscale) = (16.0, false, Some(1.5), Some(0.7));
        for scaling in [
            RopeScaling::Default,
            RopeScaling::Linear { factor: 2.0 },
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 },
            RopeScaling::Yarn(Yarn::new(4.0, 32_768)),
            RopeScaling::Yarn(odd),
        ] {
            let object = Map::from_iter([("rope_scaling".to_owned(), scaling.to_json())]);
            let fields = Fields { path: Path::new("config.json"), prefix: "", object: &object };
            assert_eq!(RopeScaling::parse(&fields, 1).unwrap(), (1e4, scaling));
        }
    }
}
