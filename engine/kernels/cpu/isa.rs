//! Which vector instructions this processor has, and the choice among the forms of a kernel.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// The forms kernels come in, best last. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust: any processor.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with `vdpbf16ps` and `vpdpbusd`; every processor with the first has the second.
    Avx512Bf16,
    /// The same, and AMX with bf16 and bytes, which the system has granted to this process.
    AmxBf16,
}

impl Isa {
    pub const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::AmxBf16];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::AmxBf16 => "amx_bf16",
        }
    }

    /// The best form that this processor can run. The first call asks the system for AMX's registers.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(Self::detect)
    }

    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx512 && is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni") {
                return if super::amx::granted() { Self::AmxBf16 } else { Self::Avx512Bf16 };
            }
            if avx512 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// The form in use: the best one, or a lower one named by `PERILUNE_ISA` (to test and to measure the others).
/// A name that is unknown or beyond this processor leaves the best one in use; `perilune doctor` shows the choice.
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let best = Isa::best();
        let asked = std::env::var("PERILUNE_ISA").ok();
        Isa::ALL.into_iter().find(|isa| Some(isa.name()) == asked.as_deref()).map_or(best, |isa| isa.min(best))
    })
}

/// What `PERILUNE_F32` may say: where products of f32 run on a processor with AMX.
pub const F32_CHOICES: [&str; 2] = ["amx", "avx512"];

/// Set by [`expect_many_rows`].
static MANY_ROWS: AtomicBool = AtomicBool::new(false);

/// Says that this process trains, so that products of many rows matter most to it: see [`f32_on_amx`]. Has an effect only before
/// the first product.
pub fn expect_many_rows() {
    MANY_ROWS.store(true, Relaxed);
}

/// Whether products of f32 run on AMX too where it is in use (split_f32.rs): in processes that train ([`expect_many_rows`]) and
/// gain 6 to 20 % by it, not in those that only generate, where one text would lose up to half of its speed. `PERILUNE_F32`, `amx`
/// or `avx512`, chooses otherwise. Unit tests take AMX.
pub fn f32_on_amx() -> bool {
    static CHOSEN: OnceLock<bool> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let asked = std::env::var("PERILUNE_F32").ok().and_then(|name| F32_CHOICES.iter().position(|choice| *choice == name));
        isa() == Isa::AmxBf16 && asked.map_or_else(|| cfg!(test) || MANY_ROWS.load(Relaxed), |choice| choice == 0)
    })
}

/// What products run on, by name: bits are the same where this is.
pub fn instructions() -> &'static str {
    if f32_on_amx() { "amx_bf16 and amx_f32" } else { isa().name() }
}

/// Writes a function whose loops are compiled for each form and picked by [`isa`]: plain Rust that the compiler turns
/// into vector code. For loops that need no intrinsics; reductions keep lanes in fixed arrays so that every form adds
/// in the same order.
#[macro_export]
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($generic:ident : $bound:path),*>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512 $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::kernels::cpu::isa::isa() {
                    // SAFETY: isa() answers Avx512 only on a processor that has all features named above.
                    $crate::kernels::cpu::isa::Isa::Avx512
                    | $crate::kernels::cpu::isa::Isa::Avx512Bf16
                    | $crate::kernels::cpu::isa::Isa::AmxBf16 => return unsafe { avx512($($arg),*) },
                    // SAFETY: isa() answers Avx2 only on a processor that has AVX2 and FMA.
                    $crate::kernels::cpu::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::kernels::cpu::isa::Isa::Portable => {}
                }
            }
            body($($arg),*)
        }
    };
}

#[cfg(test)]
mod tests {

    vectorised! {
        /// Adds `by` to each value.
        fn shift(x: &mut [f32], by: f32) {
            for v in x { *v += by; }
        }
    }

    #[test]
    fn a_vectorised_function_computes_what_its_body_says() {
        let mut x = [1.0, 2.0, 3.5];
        shift(&mut x, 0.5);
        assert_eq!(x, [1.5, 2.5, 4.0]);
    }
}
