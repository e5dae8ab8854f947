//! Matrix products of bf16, of split f32 (split_f32.rs), and of bytes, on the tile registers of AMX: up to 16 rows times a panel of
//! 32 columns, a group of the reduction at a time. Also whether this process may use them. Knows addresses and strides, not
//! matrices; which product runs in which form is isa.rs's choice and that of the tile_*.rs.
//!
//! `tdpbf16ps` adds to a tile of f32 sums, `[16 rows][16 columns]`, the product of `[16 rows][16 units]` and `[16 units][16
//! columns]`; for each sum it adds the even products of the 16 units from zero, likewise the odd ones, then both together,
//! then those to the sum. Denormal numbers count as zero. So a sum is one chain of groups of 16 units, and its bits depend
//! on where groups begin, but not on how many rows a tile has. `tdpbusd` does the like with 64 bytes,
//! unsigned times signed, and sums of 32 bits. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
//! TDPBF16PS and TDPBUSD.
//!
//! Tile registers belong to a thread and the compiler never touches them. Between two calls only their shapes stay, which is
//! remembered for each thread, and the sums of a [`SplitSums`] as long as it lives.

use super::isa::Isa;
use super::split_f32::ROW_WORDS;
use super::tile::TileArgs;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::cell::Cell;

/// Units of a group: a row of a tile register, 64 bytes.
pub(super) const GROUP_UNITS: usize = 16;

/// Most rows of a tile: those of a register.
pub(super) const TILE_ROWS: usize = 16;

/// Bytes between the units of a panel.
const PANEL_STRIDE: usize = 128;

/// Whether the processor has AMX with bf16 and bytes and the system lets this process use it. Linux grants the registers to those who
/// ask, since they make a thread's saved state 8 KiB larger; other systems are not asked.
pub(super) fn granted() -> bool {
    has_amx() && request_tiles()
}

#[allow(unused_unsafe, reason = "newer compilers call the instruction safe")]
fn has_amx() -> bool {
    const XTILE: u64 = 0b11 << 17;
    // SAFETY: every processor of 64 bits has the instruction; leaves beyond the highest one are not asked for.
    let leaf = |leaf, part| unsafe { __cpuid_count(leaf, part) };
    if leaf(0, 0).eax < 0x1d || !is_x86_feature_detected!("xsave") {
        return false;
    }
    let has = |bit: u32| leaf(7, 0).edx >> bit & 1 == 1;
    let (has_bf16, has_tile, has_int8) = (has(22), has(24), has(25));
    if !(has_bf16 && has_tile && has_int8) {
        return false;
    }
    // SAFETY: the detection of `xsave` includes that the system has switched xgetbv on.
    let saved = unsafe { _xgetbv(0) };
    // Palette 1: 8 registers of 16 rows of 64 bytes.
    let palette = leaf(0x1d, 1);
    let (row_bytes, registers, rows) = (palette.ebx & 0xffff, palette.ebx >> 16, palette.ecx & 0xffff);
    saved & XTILE == XTILE && registers >= 8 && row_bytes >= 64 && rows >= 16
}

#[cfg(target_os = "linux")]
fn request_tiles() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: this system call reads two integers and no memory; it asks for a right and changes nothing if refused. The
    // instruction overwrites rcx and r11, which are named.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn request_tiles() -> bool {
    false
}

thread_local! {
    /// Rows that this thread's registers are configured for; 0 when they are released.
    static CONFIGURED: Cell<usize> = const { Cell::new(0) };
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Shapes the registers for tiles of `rows`: 0 and 1 hold sums, 2 rows, 3 columns. Takes about 70 ns, so that it
/// is done only when the height changes.
///
/// # Safety
/// [`granted`] has said yes; `rows` is 1 to [`TILE_ROWS`].
unsafe fn configure(rows: usize) {
    if CONFIGURED.get() == rows {
        return;
    }
    let mut configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    configuration.row_bytes[..4].fill(64);
    configuration.rows[..4].copy_from_slice(&[rows as u8, rows as u8, rows as u8, 16]);
    // SAFETY: the process may use the registers; the configuration is 64 bytes long and valid for palette 1, whose
    // registers have at most 16 rows of 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack, readonly)) };
    CONFIGURED.set(rows);
}

/// Releases this thread's tile registers when it goes out of scope, if [`tile`] has used them: as long as they are in use,
/// every switch to another thread saves 8 KiB more.
pub(super) struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        if CONFIGURED.replace(0) != 0 {
            // SAFETY: the registers were configured, so the process may use them; nobody wants their content.
            unsafe { asm!("tilerelease", options(nostack)) };
        }
    }
}

/// The tile of `rows` rows, at most 16, and one panel.
///
/// # Safety
/// As [`super::tile::TileElement::tile`] for [`Isa::AmxBf16`]: groups of `a` are whole, with zeros past the last unit.
pub(super) unsafe fn tile(rows: usize, args: &TileArgs<bf16>) {
    debug_assert!(Isa::best() == Isa::AmxBf16);
    let (groups, rest) = (args.units / GROUP_UNITS, args.units % GROUP_UNITS);
    // SAFETY: the caller's promise: the processor has the form, and the addresses are valid.
    unsafe {
        configure(rows);
        if groups > 0 || rest == 0 {
            match args.asks_alone() {
                true => bf16_groups_ahead(args, groups),
                false => bf16_groups(args, groups),
            }
        }
        if rest > 0 {
            rest_of_tile(args, groups, rest);
        }
    }
}

/// Adds the last `rest` units of a panel, which end inside a group: they go through a copy with zeros after them.
///
/// # Safety
/// As [`tile`]; the registers have the right shape.
#[cold]
unsafe fn rest_of_tile(args: &TileArgs<bf16>, groups: usize, rest: usize) {
    let mut padded = [bf16::ZERO; GROUP_UNITS * PANEL_STRIDE / 2];
    // SAFETY: the caller's promise. The copy holds the last `rest` units of the panel, and as many groups are left of `a`: one.
    unsafe {
        std::ptr::copy_nonoverlapping(args.b.add(groups * GROUP_UNITS * args.b_unit), padded.as_mut_ptr(), rest * PANEL_STRIDE / 2);
        let a = args.a.add(groups * args.a_unit);
        bf16_groups(&TileArgs { a, b: padded.as_ptr(), add: args.add || groups > 0, ..*args }, 1);
    }
}

/// The tile of `planes` rows, at most 16, of unsigned bytes and one panel of signed ones, with sums of 32 bits in the place of f32. A
/// unit is 4 bytes.
///
/// # Safety
/// As [`tile`]; the panel too is made of whole groups.
pub(super) unsafe fn int8_tile(planes: usize, args: &TileArgs<i8>) {
    debug_assert!(Isa::best() == Isa::AmxBf16 && args.units.is_multiple_of(GROUP_UNITS));
    // SAFETY: the caller's promise: the processor has the form, and the addresses are valid.
    unsafe {
        configure(planes);
        match args.asks_alone() {
            true => int8_groups_ahead(args, args.units / GROUP_UNITS),
            false => int8_groups(args, args.units / GROUP_UNITS),
        }
    }
}

/// The products of a group of split f32, in four equal parts: to each sum those of the parts 2 and 0 are added, of 1 and 0, 1 and 1,
/// 0 and 1, 0 and 2, and 0 and 0. Few registers are in use: where another thread runs on the same core, each one more makes loads
/// wait, and with eight of them products take 3 to 4 times as long as with four.
macro_rules! split_products {
    (0) => {
        concat!(
            "tileloadd tmm2, [{a} + {a_row} + 128]\n",
            "tileloadd tmm3, [{b} + {b_row}]\n",
            "tdpbf16ps tmm0, tmm2, tmm3\n",
            "tileloadd tmm3, [{b} + {b_row} + 64]\n",
            "tdpbf16ps tmm1, tmm2, tmm3\n",
            "tileloadd tmm2, [{a} + {a_row} + 64]\n",
            "tdpbf16ps tmm1, tmm2, tmm3\n",
        )
    };
    (1) => {
        concat!(
            "tileloadd tmm3, [{b} + {b_row}]\n",
            "tdpbf16ps tmm0, tmm2, tmm3\n",
            "tileloadd tmm3, [{b} + {b_row} + 2048]\n",
            "tdpbf16ps tmm0, tmm2, tmm3\n",
            "tileloadd tmm3, [{b} + {b_row} + 2112]\n",
            "tdpbf16ps tmm1, tmm2, tmm3\n",
        )
    };
    (2) => {
        concat!(
            "tileloadd tmm2, [{a} + {a_row}]\n",
            "tdpbf16ps tmm1, tmm2, tmm3\n",
            "tileloadd tmm3, [{b} + {b_row} + 2048]\n",
            "tdpbf16ps tmm0, tmm2, tmm3\n",
            "tileloadd tmm3, [{b} + {b_row} + 4096]\n",
            "tdpbf16ps tmm0, tmm2, tmm3\n",
        )
    };
    (3) => {
        concat!(
            "tileloadd tmm3, [{b} + {b_row} + 4160]\n",
            "tdpbf16ps tmm1, tmm2, tmm3\n",
            "tileloadd tmm3, [{b} + {b_row} + 64]\n",
            "tdpbf16ps tmm1, tmm2, tmm3\n",
            "tileloadd tmm3, [{b} + {b_row}]\n",
            "tdpbf16ps tmm0, tmm2, tmm3\n",
        )
    };
}

/// Takes up the sums at `c`, or zeros without `add`.
macro_rules! take_up {
    () => {
        concat!(
            "test {add:e}, {add:e}\n",
            "jz 2f\n",
            "tileloadd tmm0, [{c} + {c_row}]\n",
            "tileloadd tmm1, [{c} + {c_row} + 64]\n",
            "jmp 3f\n",
            "2:\n",
            "tilezero tmm0\n",
            "tilezero tmm1\n",
            "3:\n",
        )
    };
}

/// Bytes between the rows of a group of split f32.
const SPLIT_ROW: usize = ROW_WORDS * 4;

/// The sums of up to 16 rows and one panel of split f32 in tile registers, from [`begin`](Self::begin) to [`end`](Self::end). They stay
/// there because nothing but this file uses the registers, and nothing of it may run in between.
pub(super) struct SplitSums {
    sums: *mut f32,
}

impl SplitSums {
    /// Takes up `sums`, `[rows][32]`, or zeros without `add`.
    ///
    /// # Safety
    /// [`granted`] has said yes; `rows` is 1 to [`TILE_ROWS`]; `sums` may be read and written by this thread alone until the end.
    pub(super) unsafe fn begin(rows: usize, sums: *mut f32, add: bool) -> Self {
        // SAFETY: the caller's promise; the registers get the shape of `rows` first.
        unsafe {
            configure(rows);
            asm!(
                take_up!(),
                add = in(reg) u32::from(add), c = in(reg) sums, c_row = in(reg) PANEL_STRIDE,
                out("tmm0") _, out("tmm1") _,
                options(nostack),
            );
        }
        Self { sums }
    }

    /// Adds all products of `groups` groups, one or more, of packed rows, `row_words` apart from a group to the next, and of a split
    /// panel.
    ///
    /// # Safety
    /// The rows and the panel hold so many groups.
    pub(super) unsafe fn add(&mut self, rows: *const f32, row_words: usize, panel: *const f32, groups: usize) {
        // SAFETY: the caller's promise; `begin` has shaped the registers.
        unsafe {
            asm!(
                "2:",
                split_products!(0),
                split_products!(1),
                split_products!(2),
                split_products!(3),
                "add {a}, {a_group}",
                "add {b}, 6144",
                "dec {groups}",
                "jnz 2b",
                a = inout(reg) rows => _, a_row = in(reg) SPLIT_ROW, a_group = in(reg) row_words * 4,
                b = inout(reg) panel => _, b_row = in(reg) PANEL_STRIDE, groups = inout(reg) groups => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, readonly),
            );
        }
    }

    /// Adds the quarter `quarter` of the products of one group; the four of them in order are [`Self::add`].
    ///
    /// # Safety
    /// As [`Self::add`], for one group.
    #[inline(always)]
    pub(super) unsafe fn add_quarter(&mut self, quarter: usize, rows: *const f32, panel: *const f32) {
        macro_rules! add {
            ($quarter:tt) => {
                asm!(
                    split_products!($quarter),
                    "/* {a} {a_row} */",
                    a = in(reg) rows, a_row = in(reg) SPLIT_ROW, b = in(reg) panel, b_row = in(reg) PANEL_STRIDE,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nostack, readonly),
                )
            };
        }
        // SAFETY: the caller's promise; `begin` has shaped the registers, and tmm2 and tmm3 are those of the quarter before.
        unsafe {
            match quarter {
                0 => add!(0),
                1 => add!(1),
                2 => add!(2),
                _ => add!(3),
            }
        }
    }

    /// Writes the sums back.
    pub(super) fn end(self) {
        // SAFETY: `begin` was promised that the sums may be written, and has shaped the registers.
        unsafe {
            asm!(
                "tilestored [{c} + {c_row}], tmm0",
                "tilestored [{c} + {c_row} + 64], tmm1",
                c = in(reg) self.sums, c_row = in(reg) PANEL_STRIDE,
                options(nostack),
            );
        }
    }
}

/// Asks for the 32 lines of a group of a panel, at `ahead`, into the second cache: with few rows the registers would wait for memory
/// line by line (13 GB/s for one row, where the machine has 30).
macro_rules! ask_ahead {
    (true) => {
        concat!(
            ask_ahead!(0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960),
            ask_ahead!(1024, 1088, 1152, 1216, 1280, 1344, 1408, 1472, 1536, 1600, 1664, 1728, 1792, 1856, 1920, 1984),
            "add {ahead}, 2048\n",
        )
    };
    (false) => { "/* {ahead} */\n" };
    ($($offset:literal),*) => { concat!($("prefetcht1 [{ahead} + ", $offset, "]\n"),*) };
}

/// Defines `$name`, up to 16 rows times one panel, over whole groups and in registers of the right shape, by the instruction
/// `$multiply`. One register of rows and one of columns are loaded again and again, and two hold sums: see [`split_products`].
macro_rules! whole_groups {
    ($name:ident, $multiply:literal, $element:ty, $ahead:tt) => {
        /// # Safety
        /// As [`tile`].
        unsafe fn $name(args: &TileArgs<$element>, groups: usize) {
            const SIZE: usize = size_of::<$element>();
            let TileArgs { a, a_row, a_unit, b, b_unit, c, c_row, ahead, add, .. } = *args;
            debug_assert!(b_unit * SIZE == PANEL_STRIDE);
            // SAFETY: the registers are configured for the tile's rows, so that what is loaded and stored is what the caller
            // vouches for: so many rows of `groups` groups of `a`, as many units of the panel, and the tile `c`. No other code
            // uses tile registers, and nothing is expected of them afterwards. Lines asked for may be of any address.
            unsafe {
                asm!(
                    take_up!(),
                    "test {groups}, {groups}",
                    "jz 5f",
                    "4:",
                    ask_ahead!($ahead),
                    "tileloadd tmm2, [{a} + {a_row}]",
                    "tileloadd tmm3, [{b} + {b_row}]",
                    concat!($multiply, " tmm0, tmm2, tmm3"),
                    "tileloadd tmm3, [{b} + {b_row} + 64]",
                    concat!($multiply, " tmm1, tmm2, tmm3"),
                    "add {a}, {a_group}",
                    "add {b}, 2048",
                    "dec {groups}",
                    "jnz 4b",
                    "5:",
                    "tilestored [{c} + {c_row}], tmm0",
                    "tilestored [{c} + {c_row} + 64], tmm1",
                    add = in(reg) u32::from(add),
                    a = inout(reg) a => _, a_row = in(reg) a_row * SIZE, a_group = in(reg) a_unit * SIZE,
                    b = inout(reg) b => _, b_row = in(reg) PANEL_STRIDE, groups = inout(reg) groups => _,
                    c = in(reg) c, c_row = in(reg) c_row * 4, ahead = inout(reg) ahead => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nostack),
                );
            }
        }
    };
}

whole_groups!(bf16_groups, "tdpbf16ps", bf16, false);
whole_groups!(bf16_groups_ahead, "tdpbf16ps", bf16, true);
whole_groups!(int8_groups, "tdpbusd", i8, false);
whole_groups!(int8_groups_ahead, "tdpbusd", i8, true);
