//! Counts → JSON for programs and a table for people.

use crate::counters::{Count, Counters};
use crate::global::Memory;
use crate::program::{Class, Program};
use std::collections::BTreeMap;
use std::fmt::Write;

/// One source line's counts.
#[derive(Clone, Debug)]
struct Line {
    ptx: u32,
    text: String,
    source: String,
    class: Class,
    count: Count,
}

/// What a launch executed and moved.
#[derive(Clone, Debug)]
pub struct Report {
    kernel: String,
    registers: usize,
    shared_bytes: usize,
    barriers_completed_by_exits: u64,
    lines: Vec<Line>,
    /// Name, bytes, sectors read and written at least once.
    buffers: Vec<(String, usize, u64, u64)>,
}

fn add(total: &mut Count, count: &Count) {
    let one = |count: &Count| Counters { counts: vec![*count], ..Counters::default() };
    let mut pair = one(total);
    pair.merge(&one(count));
    *total = pair.counts[0];
}

fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                quoted.push('\\');
                quoted.push(c);
            }
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", c as u32);
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

fn count_json(count: &Count) -> String {
    format!(
        "\"warp_instructions\": {}, \"thread_instructions\": {}, \"divergent_branches\": {}, \
         \"shared_wavefronts\": {}, \"shared_wavefronts_ideal\": {}, \"global_sectors\": {}, \
         \"global_sectors_unique\": {}, \"global_sectors_ideal\": {}, \"global_bytes_read\": {}, \
         \"global_bytes_written\": {}",
        count.warps,
        count.threads,
        count.divergent,
        count.wavefronts,
        count.wavefronts_ideal,
        count.sectors,
        count.sectors_unique,
        count.sectors_ideal,
        count.bytes_read,
        count.bytes_written
    )
}

impl Report {
    pub(crate) fn new(program: &Program, counters: &Counters, memory: &Memory) -> Self {
        let executed = program.insts.iter().zip(&counters.counts).filter(|(_, count)| count.warps > 0);
        let lines = executed.map(|(inst, count)| {
            let (file, line) = inst.source;
            let text = program.lines.get(inst.line.saturating_sub(1) as usize).map_or("", |text| text.trim());
            Line {
                ptx: inst.line,
                text: text.to_owned(),
                source: program.files.get(&file).map_or(String::new(), |file| format!("{file}:{line}")),
                class: inst.class,
                count: *count,
            }
        });
        let buffers = memory.buffers().iter().map(|buffer| {
            let (read, written) = buffer.touched();
            (buffer.name.clone(), buffer.bytes, read, written)
        });
        Self {
            kernel: program.name.clone(),
            registers: program.slot_names.len() - program.constants.len() - program.specials.len(),
            shared_bytes: program.static_shared,
            barriers_completed_by_exits: counters.barriers_completed_by_exits,
            lines: lines.collect(),
            buffers: buffers.collect(),
        }
    }

    fn total(&self) -> Count {
        let mut total = Count::default();
        self.lines.iter().for_each(|line| add(&mut total, &line.count));
        total
    }

    fn classes(&self) -> Vec<(&'static str, u64)> {
        let count = |class: Class| {
            self.lines.iter().filter(|line| line.class == class).map(|line| line.count.warps).sum::<u64>()
        };
        Class::ALL.iter().map(|&class| (class.name(), count(class))).filter(|(_, n)| *n > 0).collect()
    }

    /// Counts by source line: the CUDA line where the PTX names it, else the PTX line.
    fn by_source(&self) -> BTreeMap<String, Count> {
        let mut found: BTreeMap<String, Count> = BTreeMap::new();
        for line in &self.lines {
            let key = if line.source.is_empty() { format!("ptx:{}", line.ptx) } else { line.source.clone() };
            add(found.entry(key).or_default(), &line.count);
        }
        found
    }

    /// Everything as one JSON object.
    #[must_use]
    pub fn json(&self) -> String {
        let classes: Vec<String> =
            self.classes().iter().map(|(name, count)| format!("\"{name}\": {count}")).collect();
        let lines: Vec<String> = self
            .lines
            .iter()
            .map(|line| {
                format!(
                    "{{\"ptx_line\": {}, \"text\": {}, \"source\": {}, \"class\": \"{}\", {}}}",
                    line.ptx,
                    quote(&line.text),
                    quote(&line.source),
                    line.class.name(),
                    count_json(&line.count)
                )
            })
            .collect();
        let sources: Vec<String> = self
            .by_source()
            .iter()
            .map(|(source, count)| format!("{}: {{{}}}", quote(source), count_json(count)))
            .collect();
        let buffers: Vec<String> = self
            .buffers
            .iter()
            .map(|(name, bytes, read, written)| {
                format!(
                    "{}: {{\"bytes\": {bytes}, \"unique_sectors_read\": {read}, \"unique_sectors_written\": {written}}}",
                    quote(name)
                )
            })
            .collect();
        format!(
            "{{\"kernel\": {}, \"virtual_registers\": {}, \"static_shared_bytes\": {}, \
             \"barriers_completed_by_exits\": {}, {}, \
             \"classes\": {{{}}}, \"buffers\": {{{}}}, \"sources\": {{{}}}, \"lines\": [{}]}}",
            quote(&self.kernel),
            self.registers,
            self.shared_bytes,
            self.barriers_completed_by_exits,
            count_json(&self.total()),
            classes.join(", "),
            buffers.join(", "),
            sources.join(", "),
            lines.join(", ")
        )
    }

    /// A table for people: totals, classes, buffers and the busiest lines.
    #[must_use]
    pub fn table(&self, busiest: usize) -> String {
        let total = self.total();
        let mut text = format!("kernel {}\n", self.kernel);
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<34} {value:>18}");
        };
        row("warp instructions", total.warps.to_string());
        row("thread instructions", total.threads.to_string());
        row("divergent branches", total.divergent.to_string());
        row("shared wavefronts / ideal", format!("{} / {}", total.wavefronts, total.wavefronts_ideal));
        row(
            "global sectors / unique / ideal",
            format!("{} / {} / {}", total.sectors, total.sectors_unique, total.sectors_ideal),
        );
        row("global bytes read / written", format!("{} / {}", total.bytes_read, total.bytes_written));
        if self.barriers_completed_by_exits > 0 {
            row("barriers completed by exits", self.barriers_completed_by_exits.to_string());
        }
        for (name, count) in self.classes() {
            row(&format!("class {name}"), count.to_string());
        }
        for (name, bytes, read, written) in &self.buffers {
            row(&format!("{name} ({bytes} B) sectors r / w"), format!("{read} / {written}"));
        }
        let mut sources: Vec<(String, Count)> = self.by_source().into_iter().collect();
        sources.sort_by_key(|(_, count)| std::cmp::Reverse(count.warps));
        let _ = writeln!(
            text,
            "  {:<28} {:>12} {:>12} {:>9} {:>15} {:>15}",
            "line", "warp instr", "lanes/instr", "diverged", "wavefr./ideal", "sectors/ideal"
        );
        for (source, count) in sources.iter().take(busiest) {
            let _ = writeln!(
                text,
                "  {source:<28} {:>12} {:>12.1} {:>9} {:>15} {:>15}",
                count.warps,
                count.threads as f64 / count.warps as f64,
                count.divergent,
                format!("{}/{}", count.wavefronts, count.wavefronts_ideal),
                format!("{}/{}", count.sectors, count.sectors_ideal)
            );
        }
        text
    }

    /// Thread instructions executed: the figure of the throughput bench.
    #[must_use]
    pub fn thread_instructions(&self) -> u64 {
        self.total().threads
    }
}
