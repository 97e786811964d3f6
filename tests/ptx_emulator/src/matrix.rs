//! ldmatrix, stmatrix, movmatrix, mma.sync and wmma: fragments spread over the lanes of a warp.

use crate::access::{lanes_per_phase, need_written};
use crate::accumulate::{dot, sums_are_exact};
use crate::block::{Block, Launch, lanes, optional};
use crate::convert::element;
use crate::counters::{Count, Counters};
use crate::fault::Fault;
use crate::lanes::Lanes;
use crate::options::MatrixModel;
use crate::program::{Multiply, Op, Slot, WmmaAccess};
use crate::refusal::Complaint;
use crate::rounding::{F16, Rounding, bf16_to_f32, encode, f16_to_f32};
use crate::shared::Who;
use crate::step::resolve;
use crate::types::{Space, Type};
use crate::warp::Warp;

/// Where an element of a fragment stands: for A (row, k), for B (k, column), for C and D (row, column).
type Place = (usize, usize);

/// Elements of one 32-bit register.
fn per_register(kind: Type) -> usize {
    (4 / kind.bytes()).max(1)
}

/// Place of element `e` (counted over the registers) of an mma.sync operand in `lane`.
fn mma_place(role: char, kind: Type, lane: usize, e: usize) -> Place {
    let (group, thread) = (lane / 4, lane % 4);
    let per = per_register(kind);
    let (register, part) = (e / per, e % per);
    match role {
        'a' => (group + 8 * (register & 1), per * thread + part + 4 * per * (register >> 1)),
        'b' => (per * thread + part + 4 * per * register, group),
        // Accumulators of f32 and s32 come one to a register, of f16 two.
        _ => {
            let pair = e / 2;
            (group + 8 * pair, 2 * thread + e % 2)
        }
    }
}

/// wmma fragments are opaque to programs: here their elements follow each other row by row, lane by lane.
/// Fragments with twice the room hold everything twice, as on the hardware.
fn wmma_place(columns: usize, elements: usize, total: usize, lane: usize, e: usize) -> Place {
    let linear = (lane * elements + e) % total;
    (linear / columns, linear % columns)
}

/// Shape of one operand of a product.
pub(crate) struct Shape {
    pub(crate) role: char,
    pub(crate) kind: Type,
    pub(crate) columns: usize,
    /// Elements of the matrix.
    pub(crate) total: usize,
    pub(crate) wmma: bool,
}

/// For each register, part and lane, in this order: the element's index in the dense matrix, row by row.
pub(crate) fn places(shape: &Shape, registers: usize) -> Box<[u16]> {
    let per = per_register(shape.kind);
    let mut all = Vec::with_capacity(registers * per * 32);
    for e in 0..registers * per {
        for lane in 0..32 {
            let (row, column) = if shape.wmma {
                wmma_place(shape.columns, registers * per, shape.total, lane, e)
            } else {
                mma_place(shape.role, shape.kind, lane, e)
            };
            all.push((row * shape.columns + column) as u16);
        }
    }
    all.into()
}

/// Dense operands of the product at hand.
pub(crate) struct Scratch {
    a: [f64; 512],
    b: [f64; 512],
    c: [f64; 1024],
}

impl Default for Scratch {
    fn default() -> Self {
        Self { a: [0.0; 512], b: [0.0; 512], c: [0.0; 1024] }
    }
}

/// Reads a fragment into a dense matrix.
#[inline]
fn gather(
    warp: &Warp,
    registers: &[Slot],
    places: &[u16],
    kind: Type,
    value: impl Fn(u64) -> f64,
    into: &mut [f64],
) {
    let per = per_register(kind);
    let bits = kind.bits().min(32) as usize;
    let mask = u64::MAX >> (64 - bits);
    for (e, lanes) in places.chunks_exact(32).enumerate() {
        let words = warp.get(registers[e / per]);
        let shift = bits * (e % per);
        for lane in 0..32 {
            into[usize::from(lanes[lane])] = value(words[lane] >> shift & mask);
        }
    }
}

/// Reads a fragment of any type.
fn gather_any(warp: &Warp, registers: &[Slot], places: &[u16], kind: Type, into: &mut [f64]) {
    match kind {
        Type::Bf16 => gather(warp, registers, places, kind, |x| f64::from(bf16_to_f32(x as u16)), into),
        Type::F16 => gather(warp, registers, places, kind, |x| f64::from(f16_to_f32(x as u16)), into),
        Type::F32 => gather(warp, registers, places, kind, |x| f64::from(f32::from_bits(x as u32)), into),
        kind if kind.is_float() => gather(warp, registers, places, kind, |x| element(x, kind), into),
        kind => gather(warp, registers, places, kind, |x| integer(x, kind), into),
    }
}

fn integer(bits: u64, kind: Type) -> f64 {
    match kind {
        Type::S8 => f64::from(bits as i8),
        Type::S32 => f64::from(bits as i32),
        Type::U32 => f64::from(bits as u32),
        _ => f64::from(bits as u8),
    }
}

fn product_result(sum: f64, multiply: &Multiply) -> u64 {
    match multiply.d_kind {
        Type::F16 => encode(sum, F16, Rounding::NearestEven),
        Type::S32 | Type::U32 => {
            let sum =
                if multiply.satfinite { sum.clamp(f64::from(i32::MIN), f64::from(i32::MAX)) } else { sum };
            u64::from(sum as i64 as u32)
        }
        _ if sum.is_nan() => 0x7fff_ffff,
        _ => u64::from((sum as f32).to_bits()),
    }
}

impl Block {
    pub(crate) fn matrix(
        &mut self,
        launch: &Launch,
        counters: &mut Counters,
        w: usize,
        active: u32,
        pc: u32,
        op: &Op,
    ) -> Result<(), Fault> {
        if active != u32::MAX {
            let missing = (!active).trailing_zeros();
            let text = format!("lane {missing} does not take part, and this instruction needs all 32");
            return Err(Fault::new(Complaint::Collective, active.trailing_zeros(), text));
        }
        match op {
            Op::Multiply(multiply) => self.multiply(launch, w, multiply),
            Op::LoadMatrix { address, offset, space, transpose, dst } => {
                let rows = self.rows(launch, counters, w, pc, (*space, *address, *offset), dst.len())?;
                let (mut whole, mut stray) = (u32::MAX, None);
                for (lane, &offset) in rows.iter().enumerate() {
                    let who = Who { warp: w, lane, pc };
                    let result = self.shared.read(&self.order, who, offset, 16, false);
                    if !result.map_err(|fault| fault.at(lane))? {
                        whole &= !(1 << lane);
                        stray.get_or_insert((pc, offset));
                    }
                }
                self.warps[w].stray = stray.or(self.warps[w].stray);
                for (matrix, &register) in dst.iter().enumerate() {
                    let mut out: Lanes = [0; 32];
                    let mut defined = u32::MAX;
                    for lane in 0..32 {
                        for half in 0..2 {
                            let (row, column) = matrix_place(lane, half, *transpose);
                            let at = rows[8 * matrix + row] + 2 * column;
                            out[lane] |= self.shared.get(at, 2) << (16 * half);
                            if whole >> (8 * matrix + row) & 1 == 0 {
                                defined &= !(1 << lane);
                            }
                        }
                    }
                    self.warps[w].set(register, &out, active, defined);
                }
                Ok(())
            }
            Op::StoreMatrix { address, offset, space, transpose, src } => {
                let rows = self.rows(launch, counters, w, pc, (*space, *address, *offset), src.len())?;
                for (matrix, &register) in src.iter().enumerate() {
                    self.warps[w].need(register, active, launch.program, "the matrix stored")?;
                    let words = *self.warps[w].get(register);
                    for lane in 0..32 {
                        for half in 0..2 {
                            let (row, column) = matrix_place(lane, half, *transpose);
                            let at = rows[8 * matrix + row] + 2 * column;
                            self.changed |= self.shared.put(at, 2, words[lane] >> (16 * half));
                        }
                    }
                }
                for (lane, &offset) in rows.iter().enumerate() {
                    let who = Who { warp: w, lane, pc };
                    let result = self.shared.write(&self.order, who, offset, 16, None, false);
                    result.map_err(|fault| fault.at(lane))?;
                }
                Ok(())
            }
            Op::MoveMatrix { dst, src } => {
                let warp = &mut self.warps[w];
                warp.need(*src, active, launch.program, "the matrix moved")?;
                let words = *warp.get(*src);
                let mut out: Lanes = [0; 32];
                for lane in 0..32 {
                    for half in 0..2 {
                        // Element (row, column) of the result is element (column, row) of the source.
                        let (row, column) = matrix_place(lane, half, false);
                        let from = words[4 * column + row / 2] >> (16 * (row % 2)) & 0xffff;
                        out[lane] |= from << (16 * half);
                    }
                }
                warp.set(*dst, &out, active, u32::MAX);
                Ok(())
            }
            Op::WmmaLoad(access) => self.wmma_load(launch, &mut counters.counts[pc as usize], w, pc, access),
            Op::WmmaStore(access) => {
                self.wmma_store(launch, &mut counters.counts[pc as usize], w, pc, access)
            }
            _ => Ok(()),
        }
    }

    /// Offsets of the rows that ldmatrix or stmatrix names, eight for each matrix.
    fn rows(
        &mut self,
        launch: &Launch,
        counters: &mut Counters,
        w: usize,
        pc: u32,
        (space, slot, offset): (Space, Slot, i64),
        matrices: usize,
    ) -> Result<Vec<usize>, Fault> {
        let named = u32::MAX >> (32 - 8 * matrices);
        let warp = &self.warps[w];
        warp.need(slot, named, launch.program, "the address of a row")?;
        let addresses = *warp.get(slot);
        let mut rows = Vec::with_capacity(32);
        for lane in lanes(named) {
            let (space, address) = resolve(space, addresses[lane].wrapping_add(offset as u64));
            if space != Space::Shared {
                let text = format!("address {address:#x} is not in shared memory");
                return Err(Fault::new(Complaint::OutOfBounds, lane as u32, text));
            }
            rows.push(self.shared.locate(address, 16).map_err(|fault| fault.at(lane))?);
        }
        let accesses: Vec<(usize, usize)> = rows.iter().copied().enumerate().collect();
        counters.counts[pc as usize].shared_access(&accesses, 16, lanes_per_phase(16));
        Ok(rows)
    }

    fn multiply(&mut self, launch: &Launch, w: usize, multiply: &Multiply) -> Result<(), Fault> {
        let Multiply { m, n, k, a_kind, b_kind, c_kind, d_kind, .. } = *multiply;
        let warp = &mut self.warps[w];
        for (slots, what) in
            [(&multiply.a, "operand A"), (&multiply.b, "operand B"), (&multiply.c, "operand C")]
        {
            for &slot in slots {
                warp.need(slot, u32::MAX, launch.program, what)?;
            }
        }
        let is_integer = !a_kind.is_float();
        let scratch = &mut *self.scratch;
        let (a, b, c) = (&mut scratch.a[..m * k], &mut scratch.b[..k * n], &mut scratch.c[..m * n]);
        gather_any(warp, &multiply.a, &multiply.a_places, a_kind, a);
        gather_any(warp, &multiply.b, &multiply.b_places, b_kind, b);
        gather_any(warp, &multiply.c, &multiply.c_places, c_kind, c);
        let (a, b) = (&*a, &*b);
        let model = if is_integer { MatrixModel::Exact } else { launch.options.matrix_model };
        if model == MatrixModel::Exact && sums_are_exact(a, b, c, k) {
            for row in 0..m {
                let sums = &mut c[row * n..(row + 1) * n];
                for (i, &x) in a[row * k..(row + 1) * k].iter().enumerate() {
                    for (sum, &y) in sums.iter_mut().zip(&b[i * n..(i + 1) * n]) {
                        *sum += x * y;
                    }
                }
            }
        } else {
            let mut column = [0.0; 64];
            for j in 0..n {
                for i in 0..k {
                    column[i] = b[i * n + j];
                }
                for row in 0..m {
                    let sum = c[row * n + j];
                    c[row * n + j] =
                        dot(model, &a[row * k..(row + 1) * k], &column[..k], sum, a_kind.bytes());
                }
            }
        }
        let per = per_register(d_kind);
        for (r, &register) in multiply.d.iter().enumerate() {
            let mut out: Lanes = [0; 32];
            for part in 0..per {
                let places = &multiply.d_places[32 * (r * per + part)..][..32];
                for lane in 0..32 {
                    let bits = product_result(c[usize::from(places[lane])], multiply);
                    out[lane] |= bits << (d_kind.bits() as usize * part % 32);
                }
            }
            warp.set(register, &out, u32::MAX, u32::MAX);
        }
        Ok(())
    }

    /// Address of each element of a wmma fragment: lane by lane, with register and part.
    fn wmma_addresses(
        &self,
        launch: &Launch,
        w: usize,
        access: &WmmaAccess,
    ) -> Result<Vec<(usize, usize, usize, u64)>, Fault> {
        let warp = &self.warps[w];
        warp.need(access.address, u32::MAX, launch.program, "the address of the matrix")?;
        let (rows, columns) = match access.role {
            'a' => (access.m, access.k),
            'b' => (access.k, access.n),
            _ => (access.m, access.n),
        };
        let stride = match optional(access.stride) {
            Some(slot) => {
                warp.need(slot, u32::MAX, launch.program, "the leading dimension")?;
                warp.get(slot)[0]
            }
            None => (if access.row_major { columns } else { rows }) as u64,
        };
        let base = warp.get(access.address)[0].wrapping_add(access.offset as u64);
        if !base.is_multiple_of(16) {
            let text = format!("address {base:#x} of the matrix is no multiple of 16");
            return Err(Fault::new(Complaint::Misaligned, 0, text));
        }
        let per = per_register(access.kind);
        let elements = access.registers.len() * per;
        let mut all = Vec::with_capacity(32 * elements);
        for lane in 0..32 {
            for e in 0..elements {
                let (row, column) = wmma_place(columns, elements, rows * columns, lane, e);
                let (major, minor) = if access.row_major { (row, column) } else { (column, row) };
                let index = major as u64 * stride + minor as u64;
                let address = base.wrapping_add(index * access.kind.bytes() as u64);
                all.push((lane, e / per, e % per, address));
            }
        }
        Ok(all)
    }

    fn wmma_load(
        &mut self,
        launch: &Launch,
        count: &mut Count,
        w: usize,
        pc: u32,
        access: &WmmaAccess,
    ) -> Result<(), Fault> {
        let bytes = access.kind.bytes();
        let mut out = vec![[0u64; 32]; access.registers.len()];
        let mut defined = vec![u32::MAX; access.registers.len()];
        let mut stray = None;
        let mut hint = 0;
        let mut ranges = Vec::new();
        for (lane, register, part, address) in self.wmma_addresses(launch, w, access)? {
            let fail = |fault: Fault| fault.at(lane);
            let (space, address) = resolve(access.space, address);
            let value = if space == Space::Shared {
                let offset = self.shared.locate(address, bytes).map_err(fail)?;
                let who = Who { warp: w, lane, pc };
                if !self.shared.read(&self.order, who, offset, bytes, false).map_err(fail)? {
                    defined[register] &= !(1 << lane);
                    stray.get_or_insert((pc, offset));
                }
                self.shared.get(offset, bytes)
            } else {
                let buffer = launch.memory.find(address, bytes, false, &mut hint).map_err(fail)?;
                need_written(buffer, address, bytes).map_err(fail)?;
                buffer.touch(address, bytes, false);
                count.bytes_read += bytes as u64;
                ranges.push(address);
                buffer.read(address, bytes)
            };
            out[register][lane] |= value << (8 * bytes * part);
        }
        count.opaque_access(ranges);
        self.warps[w].stray = stray.or(self.warps[w].stray);
        for ((&register, values), &defined) in access.registers.iter().zip(&out).zip(&defined) {
            self.warps[w].set(register, values, u32::MAX, defined);
        }
        Ok(())
    }

    fn wmma_store(
        &mut self,
        launch: &Launch,
        count: &mut Count,
        w: usize,
        pc: u32,
        access: &WmmaAccess,
    ) -> Result<(), Fault> {
        let bytes = access.kind.bytes();
        for &register in &access.registers {
            self.warps[w].need(register, u32::MAX, launch.program, "the matrix stored")?;
        }
        let mut hint = 0;
        let mut ranges = Vec::new();
        for (lane, register, part, address) in self.wmma_addresses(launch, w, access)? {
            let fail = |fault: Fault| fault.at(lane);
            let word = self.warps[w].get(access.registers[register])[lane];
            let value = word >> (8 * bytes * part) & (u64::MAX >> (64 - 8 * bytes));
            let (space, address) = resolve(access.space, address);
            if space == Space::Shared {
                let offset = self.shared.locate(address, bytes).map_err(fail)?;
                let who = Who { warp: w, lane, pc };
                self.shared.write(&self.order, who, offset, bytes, Some(value), false).map_err(fail)?;
                self.changed |= self.shared.put(offset, bytes, value);
            } else {
                let buffer = launch.memory.find(address, bytes, true, &mut hint).map_err(fail)?;
                self.changed |= buffer.write(address, bytes, value);
                buffer.touch(address, bytes, true);
                count.bytes_written += bytes as u64;
                ranges.push(address);
            }
        }
        count.opaque_access(ranges);
        Ok(())
    }
}

/// Row and column of half `half` of a lane's register in an 8 x 8 matrix of 16-bit elements.
fn matrix_place(lane: usize, half: usize, transpose: bool) -> Place {
    let (a, b) = (lane / 4, 2 * (lane % 4) + half);
    if transpose { (b, a) } else { (a, b) }
}
