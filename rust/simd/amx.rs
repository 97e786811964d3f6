//! AMX: bf16 panels multiplied by tile registers; everything else is AVX-512's.
//!
//! Rust's intrinsics for AMX are not stable, so its five instructions are written as assembly.
//! Tile registers 0..4 hold sums, 4 and 5 the left operand, 6 and 7 the right one.

use super::{Bf16Kernels, FewRowsBf16, Kernels, PanelKernels, amx_linear, avx512, crossover};
use crate::gemm::tile::{Block, SIDE, Tile};
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

static KERNELS: Kernels = Kernels {
    name: "amx",
    bf16: Some(Bf16Kernels {
        panels: PanelKernels {
            // SAFETY: the table exists for callers only after `detect` found AMX and got permission
            // to use it.
            multiply: |block, sums| unsafe { multiply_bf16(block, sums) },
            decode: avx512::PANELS_BF16.decode,
        },
        interleave: avx512::INTERLEAVE,
        few_rows: Some(FewRowsBf16 {
            fewest: 2,
            // SAFETY: as above.
            prepare: |x, columns, out| unsafe { amx_linear::prepare(x, columns, out) },
            // SAFETY: as above.
            linear: |x, strip, out| unsafe { amx_linear::linear(x, strip, out) },
        }),
    }),
    few_rows: crossover::AMX,
    few_rows_bytes: Some(avx512::FEW_ROWS_BYTES),
    ..avx512::KERNELS_WITH_BF16
};

/// The table, if this CPU has AMX with bf16, and what such CPUs have beside it, and the system lets this
/// process use it.
pub(super) fn detect() -> Option<&'static Kernels> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = *FOUND.get_or_init(|| {
        avx512::detect_bf16().is_some()
            && avx512::detect_vnni().is_some()
            && has_amx()
            && request_permission()
    });
    found.then_some(&KERNELS)
}

/// CPUID leaf 7: AMX-BF16 is bit 22 of EDX, AMX-TILE bit 24. XCR0 bits 17 and 18: the system saves
/// tile registers when it switches threads.
fn has_amx() -> bool {
    let leaf = __cpuid_count(7, 0);
    let tiles = (1 << 22) | (1 << 24);
    if leaf.edx & tiles != tiles || !is_x86_feature_detected!("xsave") {
        return false;
    }
    // SAFETY: AVX-512 was detected before, which implies that XGETBV is enabled.
    let saved = unsafe { xcr0() };
    saved & (3 << 17) == 3 << 17
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: register 0 exists wherever XGETBV does.
    unsafe { _xgetbv(0) }
}

/// Linux gives tile registers to processes that ask (arch_prctl, ARCH_REQ_XCOMP_PERM).
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: this call takes two integers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// The shapes of eight tile registers.
#[repr(C, align(64))]
pub(super) struct Configuration([u8; 64]);

impl Configuration {
    /// Palette 1: rows of `bytes_per_row[tile]` bytes, 16 of them in each tile.
    pub(super) const fn new(bytes_per_row: [u8; 8]) -> Self {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            bytes[16 + 2 * tile] = bytes_per_row[tile];
            bytes[48 + tile] = SIDE as u8;
            tile += 1;
        }
        Self(bytes)
    }

    /// Run `work` with tile registers of these shapes.
    ///
    /// # Safety
    /// The process must have permission to use tile registers.
    pub(super) unsafe fn during<R>(&self, work: impl FnOnce() -> R) -> R {
        let mut before = Configuration([0; 64]);
        // SAFETY: both configurations are 64 bytes. Other libraries use tile registers too; whoever
        // configured this thread finds its configuration again afterwards.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack));
            asm!("ldtilecfg [{}]", in(reg) &raw const *self, options(nostack));
        }
        let result = work();
        // SAFETY: a configuration that this thread had, or none: 64 zero bytes release the tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const before, options(nostack)) };
        result
    }
}

static FULL_TILES: Configuration = Configuration::new([64; 8]);

/// # Safety
/// The process must have permission to use tile registers.
unsafe fn multiply_bf16(block: &Block<'_>, sums: &mut [Tile]) {
    // SAFETY: the caller's promise.
    unsafe { FULL_TILES.during(|| multiply_with_tiles(block, sums)) };
}

/// # Safety
/// Tiles must be configured as [`FULL_TILES`].
unsafe fn multiply_with_tiles(block: &Block<'_>, sums: &mut [Tile]) {
    let mut next = block.next.as_ptr().cast::<u8>();
    block.for_each_pair(sums, |left, right, sums, rows, columns| {
        debug_assert!(left.len() == right.len() && left.len().is_multiple_of(2));
        let (steps, left, right) = (left.len() / 2, left.as_ptr(), right.as_ptr());
        let sums = sums.as_mut_ptr();
        // SAFETY: tiles are configured; both panels hold `steps` steps of two tiles, sums four tiles.
        unsafe {
            match (rows > SIDE, columns > SIDE, block.start) {
                (true, true, true) => start_two_by_two(steps, left, right, sums, next),
                (true, true, false) => two_by_two(steps, left, right, sums, next),
                (true, false, true) => start_two_by_one(steps, left, right, sums, next),
                (true, false, false) => two_by_one(steps, left, right, sums, next),
                (false, true, true) => start_one_by_two(steps, left, right, sums, next),
                (false, true, false) => one_by_two(steps, left, right, sums, next),
                (false, false, true) => start_one_by_one(steps, left, right, sums, next),
                (false, false, false) => one_by_one(steps, left, right, sums, next),
            }
        }
        next = next.wrapping_add(steps * 4 * 64);
    });
}

macro_rules! define_tiles {
    ($start:ident, $name:ident, $zeros:expr, $loads:expr, $products:expr, $stores:expr) => {
        define_tiles!($start, $zeros, $products, $stores);
        define_tiles!($name, $loads, $products, $stores);
    };
    ($name:ident, $loads:expr, $products:expr, $stores:expr) => {
        /// # Safety
        /// Tiles must be configured; `left` and `right` must hold `2 * steps` tiles, `sums` four.
        #[inline]
        unsafe fn $name(steps: usize, left: *const Tile, right: *const Tile, sums: *mut Tile, next: *const u8) {
            // SAFETY: the caller's promise; each step reads two tiles from each side, rows 64 bytes
            // apart.
            unsafe {
                asm!(
                    $loads,
                    "test {steps}, {steps}",
                    "jz 3f",
                    "2:",
                    $products,
                    // Four lines a step bring the next block's activations to the second-level
                    // cache in time; a prefetch of any address is harmless.
                    "prefetcht1 [{next}]",
                    "prefetcht1 [{next} + 64]",
                    "prefetcht1 [{next} + 128]",
                    "prefetcht1 [{next} + 192]",
                    "add {next}, 256",
                    "add {left}, 2048",
                    "add {right}, 2048",
                    "dec {steps}",
                    "jnz 2b",
                    "3:",
                    $stores,
                    left = inout(reg) left => _,
                    right = inout(reg) right => _,
                    next = inout(reg) next => _,
                    sums = in(reg) sums,
                    row = in(reg) 64_usize,
                    steps = inout(reg) steps => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

define_tiles!(
    start_two_by_two,
    two_by_two,
    "tilezero tmm0
     tilezero tmm1
     tilezero tmm2
     tilezero tmm3",
    "tileloadd tmm0, [{sums} + {row}]
     tileloadd tmm1, [{sums} + {row} + 1024]
     tileloadd tmm2, [{sums} + {row} + 2048]
     tileloadd tmm3, [{sums} + {row} + 3072]",
    "tileloadd tmm6, [{right} + {row}]
     tileloadd tmm4, [{left} + {row}]
     tdpbf16ps tmm0, tmm4, tmm6
     tileloadd tmm7, [{right} + {row} + 1024]
     tdpbf16ps tmm1, tmm4, tmm7
     tileloadd tmm5, [{left} + {row} + 1024]
     tdpbf16ps tmm2, tmm5, tmm6
     tdpbf16ps tmm3, tmm5, tmm7",
    "tilestored [{sums} + {row}], tmm0
     tilestored [{sums} + {row} + 1024], tmm1
     tilestored [{sums} + {row} + 2048], tmm2
     tilestored [{sums} + {row} + 3072], tmm3"
);

define_tiles!(
    start_two_by_one,
    two_by_one,
    "tilezero tmm0
     tilezero tmm2",
    "tileloadd tmm0, [{sums} + {row}]
     tileloadd tmm2, [{sums} + {row} + 2048]",
    "tileloadd tmm6, [{right} + {row}]
     tileloadd tmm4, [{left} + {row}]
     tdpbf16ps tmm0, tmm4, tmm6
     tileloadd tmm5, [{left} + {row} + 1024]
     tdpbf16ps tmm2, tmm5, tmm6",
    "tilestored [{sums} + {row}], tmm0
     tilestored [{sums} + {row} + 2048], tmm2"
);

define_tiles!(
    start_one_by_two,
    one_by_two,
    "tilezero tmm0
     tilezero tmm1",
    "tileloadd tmm0, [{sums} + {row}]
     tileloadd tmm1, [{sums} + {row} + 1024]",
    "tileloadd tmm6, [{right} + {row}]
     tileloadd tmm4, [{left} + {row}]
     tdpbf16ps tmm0, tmm4, tmm6
     tileloadd tmm7, [{right} + {row} + 1024]
     tdpbf16ps tmm1, tmm4, tmm7",
    "tilestored [{sums} + {row}], tmm0
     tilestored [{sums} + {row} + 1024], tmm1"
);

define_tiles!(
    start_one_by_one,
    one_by_one,
    "tilezero tmm0",
    "tileloadd tmm0, [{sums} + {row}]",
    "tileloadd tmm6, [{right} + {row}]
     tileloadd tmm4, [{left} + {row}]
     tdpbf16ps tmm0, tmm4, tmm6",
    "tilestored [{sums} + {row}], tmm0"
);
