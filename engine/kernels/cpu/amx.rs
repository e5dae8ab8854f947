//! Matrix products of bf16, and of bytes, on the tile registers of AMX: up to 32 rows times a panel of 32 columns, 16 units of
//! the reduction at a time. Also whether this process may use them. Knows addresses and strides, not matrices; which product
//! runs in which form is tile_bf16.rs's and isa.rs's choice.
//!
//! `tdpbf16ps` adds to a tile of f32 sums, `[16 rows][16 columns]`, the product of `[16 rows][16 units]` and `[16 units][16
//! columns]`; for each sum it adds the even products of the 16 units from zero, likewise the odd ones, then both together,
//! then those to the sum. Denormal numbers count as zero. So a sum is one chain of groups of 16 units, and its bits depend
//! on where groups begin, but not on how many rows a tile has. `tdpbusd` does the like with 64 bytes,
//! unsigned times signed, and sums of 32 bits. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
//! TDPBF16PS and TDPBUSD.
//!
//! Tile registers belong to a thread and the compiler never touches them. Nothing stays in them between two calls of
//! [`tile`]; only their shapes do, which is remembered for each thread.

use super::isa::Isa;
use super::split_f32::ROW_WORDS;
use super::tile::TileArgs;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::cell::Cell;

/// Units of a group: a row of a tile register, 64 bytes.
pub(super) const GROUP_UNITS: usize = 16;

/// Rows of a tile: two registers of 16. With the panel's two registers they leave four for sums.
pub(super) const TILE_ROWS: usize = 32;

/// Most rows for which [`tile`] computes two panels side by side.
pub(super) const FEW_ROWS: usize = 16;

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

/// Shapes the registers for tiles of `rows`: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns. Takes about 70 ns, so that it
/// is done only when the height changes.
///
/// # Safety
/// [`granted`] has said yes; `rows` is 1 to [`TILE_ROWS`].
unsafe fn configure(rows: usize) {
    if CONFIGURED.get() == rows {
        return;
    }
    let upper = rows.min(FEW_ROWS) as u8;
    // With few rows the sums 2 and 3 belong to the second panel and the same rows.
    let lower = if rows > FEW_ROWS { (rows - FEW_ROWS) as u8 } else { upper };
    let mut configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    configuration.row_bytes[..8].fill(64);
    configuration.rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, 16, 16]);
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

/// The tile of `rows` rows and one panel, or two if there are few rows.
///
/// # Safety
/// As [`super::tile::TileElement::tile`] for [`Isa::AmxBf16`]: groups of `a` are whole, with zeros past the last unit.
pub(super) unsafe fn tile(rows: usize, panels: usize, args: &TileArgs<bf16>) {
    debug_assert!(Isa::best() == Isa::AmxBf16);
    // SAFETY: the caller's promise: the processor has the form, and the addresses are valid.
    unsafe {
        configure(rows);
        if args.units.is_multiple_of(GROUP_UNITS) {
            bf16_groups(rows, panels, args, args.units / GROUP_UNITS);
        } else {
            tile_with_rest(rows, panels, args);
        }
    }
}

/// [`tile`], when the panel ends inside a group: its last units go through a copy with zeros after them.
///
/// # Safety
/// As [`tile`]; the registers have the right shape.
#[cold]
unsafe fn tile_with_rest(rows: usize, panels: usize, args: &TileArgs<bf16>) {
    let (groups, rest) = (args.units / GROUP_UNITS, args.units % GROUP_UNITS);
    let mut padded = [[bf16::ZERO; GROUP_UNITS * PANEL_STRIDE / 2]; 2];
    // SAFETY: the caller's promise. The copies hold the last `rest` units of each panel, and as many groups are left of `a`:
    // one.
    unsafe {
        if groups > 0 {
            bf16_groups(rows, panels, args, groups);
        }
        for (panel, copy) in padded.iter_mut().enumerate().take(panels) {
            let from = args.b.add(panel * args.b_panel + groups * GROUP_UNITS * args.b_unit);
            std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), rest * PANEL_STRIDE / 2);
        }
        let last = TileArgs {
            a: args.a.add(groups * args.a_unit),
            b: padded.as_ptr().cast(),
            b_panel: padded[0].len(),
            add: args.add || groups > 0,
            ..*args
        };
        bf16_groups(rows, panels, &last, 1);
    }
}

/// The tile of `planes` rows of unsigned bytes and one panel of signed ones, with sums of 32 bits in the place of f32. A unit is
/// 4 bytes.
///
/// # Safety
/// As [`tile`]; the panel too is made of whole groups.
pub(super) unsafe fn int8_tile(planes: usize, args: &TileArgs<i8>) {
    debug_assert!(Isa::best() == Isa::AmxBf16 && args.units.is_multiple_of(GROUP_UNITS));
    // SAFETY: the caller's promise: the processor has the form, and the addresses are valid.
    unsafe {
        configure(planes);
        int8_groups(planes, 1, args, args.units / GROUP_UNITS);
    }
}

/// The products of a group of split f32, in four equal parts: to each sum those of the parts 2 and 0 are added, of 1 and 0, 1 and 1,
/// 0 and 1, 0 and 2, and 0 and 0. Few registers are in use: where another thread runs on the same core, each one more makes loads
/// wait, and with eight of them products take 3 to 4 times as long as with four.
macro_rules! split_products {
    (0) => {
        concat!(
            "tileloadd tmm4, [{a} + {a_row} + 128]\n",
            "tileloadd tmm6, [{b} + {b_row}]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloadd tmm6, [{b} + {b_row} + 64]\n",
            "tdpbf16ps tmm1, tmm4, tmm6\n",
            "tileloadd tmm4, [{a} + {a_row} + 64]\n",
            "tdpbf16ps tmm1, tmm4, tmm6\n",
        )
    };
    (1) => {
        concat!(
            "tileloadd tmm6, [{b} + {b_row}]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloadd tmm6, [{b} + {b_row} + 2048]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloadd tmm6, [{b} + {b_row} + 2112]\n",
            "tdpbf16ps tmm1, tmm4, tmm6\n",
        )
    };
    (2) => {
        concat!(
            "tileloadd tmm4, [{a} + {a_row}]\n",
            "tdpbf16ps tmm1, tmm4, tmm6\n",
            "tileloadd tmm6, [{b} + {b_row} + 2048]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloadd tmm6, [{b} + {b_row} + 4096]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
        )
    };
    (3) => {
        concat!(
            "tileloadd tmm6, [{b} + {b_row} + 4160]\n",
            "tdpbf16ps tmm1, tmm4, tmm6\n",
            "tileloadd tmm6, [{b} + {b_row} + 64]\n",
            "tdpbf16ps tmm1, tmm4, tmm6\n",
            "tileloadd tmm6, [{b} + {b_row}]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
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
    /// [`granted`] has said yes; `rows` is 1 to [`FEW_ROWS`]; `sums` may be read and written by this thread alone until the end.
    pub(super) unsafe fn begin(rows: usize, sums: *mut f32, add: bool) -> Self {
        // SAFETY: the caller's promise; the registers get the shape of `rows` first.
        unsafe {
            configure(rows);
            asm!(
                "test {add:e}, {add:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {c_row}]",
                "tileloadd tmm1, [{c} + {c_row} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "3:",
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
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _,
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
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _,
                    options(nostack, readonly),
                )
            };
        }
        // SAFETY: the caller's promise; `begin` has shaped the registers, and tmm4 and tmm6 are those of the quarter before.
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

/// Asks for the 32 lines of a group of a panel's units two groups ahead, into the second cache: with few rows the registers
/// would wait for memory line by line (13 GB/s for one row, where the machine has 30).
macro_rules! ahead_of {
    ($panel:literal) => {
        concat!(
            "prefetcht1 [{",
            $panel,
            "} + 4096]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4160]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4224]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4288]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4352]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4416]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4480]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4544]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4608]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4672]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4736]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4800]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4864]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4928]\n",
            "prefetcht1 [{",
            $panel,
            "} + 4992]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5056]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5120]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5184]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5248]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5312]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5376]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5440]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5504]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5568]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5632]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5696]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5760]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5824]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5888]\n",
            "prefetcht1 [{",
            $panel,
            "} + 5952]\n",
            "prefetcht1 [{",
            $panel,
            "} + 6016]\n",
            "prefetcht1 [{",
            $panel,
            "} + 6080]\n",
        )
    };
}

/// Defines `$name`, the tile of a number of whole groups in registers of the right shape, by the instruction `$multiply`.
macro_rules! whole_groups {
    ($name:ident, $multiply:literal, $element:ty) => {
/// # Safety
/// As [`tile`].
unsafe fn $name(rows: usize, panels: usize, args: &TileArgs<$element>, groups: usize) {
    const SIZE: usize = size_of::<$element>();
    let TileArgs { a, a_row, a_unit, b, b_unit, b_panel, c, c_row, c_panel, add, .. } = *args;
    debug_assert!(b_unit * SIZE == PANEL_STRIDE);
    let (second_rows, second_panel) = (rows > FEW_ROWS, panels > 1);
    debug_assert!(!(second_rows && second_panel) && panels <= 2);
    // Bytes from here on.
    let (a_row, a_group, c_row) = (a_row * SIZE, a_unit * SIZE, c_row * 4);
    // SAFETY: the registers are configured for `rows` (`tile`), so that what is loaded and stored is what the caller
    // vouches for: `rows` rows of `groups` groups of `a`, as many units of the panels, and the tile `c` of each panel. No
    // other code uses tile registers, and nothing is expected of them afterwards.
    unsafe {
        if second_rows {
            let (a_second, c_second) = (a.wrapping_add(FEW_ROWS * a_row / SIZE), c.wrapping_add(FEW_ROWS * c_row / 4));
            asm!(
                "test {add:e}, {add:e}",
                "jz 2f",
                "tileloadd tmm0, [{c} + {c_row}]",
                "tileloadd tmm1, [{c} + {c_row} + 64]",
                "tileloadd tmm2, [{c_second} + {c_row}]",
                "tileloadd tmm3, [{c_second} + {c_row} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "test {groups}, {groups}",
                "jz 5f",
                "4:",
                "tileloadd tmm6, [{b} + {b_row}]",
                "tileloadd tmm4, [{a} + {a_row}]",
                "tileloadd tmm7, [{b} + {b_row} + 64]",
                concat!($multiply, " tmm0, tmm4, tmm6"),
                "tileloadd tmm5, [{a_second} + {a_row}]",
                concat!($multiply, " tmm1, tmm4, tmm7"),
                concat!($multiply, " tmm2, tmm5, tmm6"),
                concat!($multiply, " tmm3, tmm5, tmm7"),
                "add {a}, {a_group}",
                "add {a_second}, {a_group}",
                "add {b}, 2048",
                "dec {groups}",
                "jnz 4b",
                "5:",
                "tilestored [{c} + {c_row}], tmm0",
                "tilestored [{c} + {c_row} + 64], tmm1",
                "tilestored [{c_second} + {c_row}], tmm2",
                "tilestored [{c_second} + {c_row} + 64], tmm3",
                add = in(reg) u32::from(add),
                a = inout(reg) a => _, a_second = inout(reg) a_second => _, a_row = in(reg) a_row, a_group = in(reg) a_group,
                b = inout(reg) b => _, b_row = in(reg) PANEL_STRIDE, groups = inout(reg) groups => _,
                c = in(reg) c, c_second = in(reg) c_second, c_row = in(reg) c_row,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
            return;
        }
        // With one panel the addresses of the second are those of the first, by which the instructions below know.
        // Panels without units lie at one place, and nothing is read of them.
        let (b_second, c_second) = if second_panel { (b.wrapping_add(b_panel.max(1)), c.wrapping_add(c_panel)) } else { (b, c) };
        asm!(
            "test {add:e}, {add:e}",
            "jz 2f",
            "tileloadd tmm0, [{c} + {c_row}]",
            "tileloadd tmm1, [{c} + {c_row} + 64]",
            "cmp {b}, {b_second}",
            "je 3f",
            "tileloadd tmm2, [{c_second} + {c_row}]",
            "tileloadd tmm3, [{c_second} + {c_row} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "test {groups}, {groups}",
            "jz 5f",
            "4:",
            ahead_of!("b"),
            "tileloadd tmm4, [{a} + {a_row}]",
            "tileloadd tmm6, [{b} + {b_row}]",
            "tileloadd tmm7, [{b} + {b_row} + 64]",
            concat!($multiply, " tmm0, tmm4, tmm6"),
            concat!($multiply, " tmm1, tmm4, tmm7"),
            "cmp {b}, {b_second}",
            "je 6f",
            ahead_of!("b_second"),
            "tileloadd tmm6, [{b_second} + {b_row}]",
            "tileloadd tmm7, [{b_second} + {b_row} + 64]",
            concat!($multiply, " tmm2, tmm4, tmm6"),
            concat!($multiply, " tmm3, tmm4, tmm7"),
            "6:",
            "add {a}, {a_group}",
            "add {b}, 2048",
            "add {b_second}, 2048",
            "dec {groups}",
            "jnz 4b",
            "5:",
            "tilestored [{c} + {c_row}], tmm0",
            "tilestored [{c} + {c_row} + 64], tmm1",
            "cmp {b}, {b_second}",
            "je 7f",
            "tilestored [{c_second} + {c_row}], tmm2",
            "tilestored [{c_second} + {c_row} + 64], tmm3",
            "7:",
            add = in(reg) u32::from(add),
            a = inout(reg) a => _, a_row = in(reg) a_row, a_group = in(reg) a_group,
            b = inout(reg) b => _, b_second = inout(reg) b_second => _, b_row = in(reg) PANEL_STRIDE, groups = inout(reg) groups => _,
            c = in(reg) c, c_second = in(reg) c_second, c_row = in(reg) c_row,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
    };
}

whole_groups!(bf16_groups, "tdpbf16ps", bf16);
whole_groups!(int8_groups, "tdpbusd", i8);
