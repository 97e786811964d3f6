//! Counts per instruction, as a profiler would show them.

/// What one instruction of the program did during a launch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    /// Times a warp issued it.
    pub(crate) warps: u64,
    /// Threads that executed it.
    pub(crate) threads: u64,
    /// Times a branch sent threads of one warp different ways.
    pub(crate) divergent: u64,
    /// Shared-memory wavefronts, and as many as the access would need without bank conflicts.
    pub(crate) wavefronts: u64,
    pub(crate) wavefronts_ideal: u64,
    /// Sectors of 32 bytes: requested by the access's phases, distinct in the whole access, and the least
    /// number that could hold its distinct bytes.
    pub(crate) sectors: u64,
    pub(crate) sectors_unique: u64,
    pub(crate) sectors_ideal: u64,
    pub(crate) bytes_read: u64,
    pub(crate) bytes_written: u64,
}

/// Counts of all instructions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) counts: Vec<Count>,
    pub(crate) barriers_completed_by_exits: u64,
}

impl Counters {
    pub(crate) fn new(instructions: usize) -> Self {
        Self { counts: vec![Count::default(); instructions], barriers_completed_by_exits: 0 }
    }

    /// A warp issues an instruction for these lanes.
    pub(crate) fn issue(&mut self, pc: u32, active: u32) {
        let count = &mut self.counts[pc as usize];
        count.warps += 1;
        count.threads += u64::from(active.count_ones());
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.barriers_completed_by_exits += other.barriers_completed_by_exits;
        for (a, b) in self.counts.iter_mut().zip(&other.counts) {
            a.warps += b.warps;
            a.threads += b.threads;
            a.divergent += b.divergent;
            a.wavefronts += b.wavefronts;
            a.wavefronts_ideal += b.wavefronts_ideal;
            a.sectors += b.sectors;
            a.sectors_unique += b.sectors_unique;
            a.sectors_ideal += b.sectors_ideal;
            a.bytes_read += b.bytes_read;
            a.bytes_written += b.bytes_written;
        }
    }
}

impl Count {
    /// Adds a global access: address and bytes per active lane, in lane order.
    pub(crate) fn global_access(&mut self, accesses: &[(u64, usize)], width: usize) {
        // The memory system takes 32 lanes of 4 bytes at once, 16 of 8 or 8 of 16.
        let per_phase = (128 / width.max(4)).clamp(8, 32);
        let mut all: Vec<u64> = Vec::with_capacity(64);
        for phase in accesses.chunks(per_phase) {
            let start = all.len();
            for &(address, bytes) in phase {
                for sector in address / 32..=(address + bytes as u64 - 1) / 32 {
                    if all.last() != Some(&sector) || all.len() == start {
                        all.push(sector);
                    }
                }
            }
            let tail = &mut all[start..];
            if !tail.is_sorted() {
                tail.sort_unstable();
            }
            self.sectors += distinct(&all[start..]);
        }
        if !all.is_sorted() {
            all.sort_unstable();
        }
        self.sectors_unique += distinct(&all);
        let mut ranges: Vec<(u64, u64)> = accesses.iter().map(|&(a, b)| (a, a + b as u64)).collect();
        if !ranges.is_sorted() {
            ranges.sort_unstable();
        }
        let mut bytes = 0;
        let mut end = 0;
        for (from, to) in ranges {
            bytes += to.max(end) - from.max(end);
            end = end.max(to);
        }
        self.sectors_ideal += bytes.div_ceil(32);
    }

    /// Adds an access whose split into lanes is the hardware's secret (wmma): only distinct sectors count.
    pub(crate) fn opaque_access(&mut self, mut addresses: Vec<u64>) {
        for address in &mut addresses {
            *address /= 32;
        }
        addresses.sort_unstable();
        let sectors = distinct(&addresses);
        self.sectors += sectors;
        self.sectors_unique += sectors;
        self.sectors_ideal += sectors;
    }

    /// Adds a shared access: offset per active lane and bytes per lane, `per_phase` lanes at once.
    pub(crate) fn shared_access(&mut self, lanes: &[(usize, usize)], width: usize, per_phase: usize) {
        let words = width.div_ceil(4);
        let mut at = 0;
        while at < lanes.len() {
            let phase = lanes[at].0 / per_phase;
            let mut first = [u32::MAX; 32];
            let mut counts = [0u8; 32];
            let mut more: Vec<u32> = Vec::new();
            while at < lanes.len() && lanes[at].0 / per_phase == phase {
                for word in lanes[at].1 / 4..lanes[at].1 / 4 + words {
                    let (word, bank) = (word as u32, word % 32);
                    if first[bank] == u32::MAX {
                        first[bank] = word;
                        counts[bank] = 1;
                    } else if first[bank] != word && !more.contains(&word) {
                        more.push(word);
                        counts[bank] += 1;
                    }
                }
                at += 1;
            }
            self.wavefronts += u64::from(counts.into_iter().max().unwrap_or(1));
            self.wavefronts_ideal += 1;
        }
    }
}

fn distinct(sorted: &[u64]) -> u64 {
    let steps = sorted.windows(2).filter(|pair| pair[0] != pair[1]).count() as u64;
    steps + u64::from(!sorted.is_empty())
}
