//! A parsed kernel → an executable program. Calls are inlined, names become slots and addresses.

mod arithmetic;
mod collective;
mod matrix;
mod memory;
mod operands;

use crate::bypass;
use crate::layout::{LOCAL_BASE, SharedLayout, align_up, shared_layout};
use crate::program::{Class, Inst, NONE, Op, Parameter, Program, Slot, Special};
use crate::refusal::{Complaint, Refusal};
use crate::syntax::{Formal, Function, Instruction, Module, Operand, Statement};
use crate::types::{Space, Type};
use operands::destination;
use std::collections::HashMap;
use std::sync::Arc;

/// One inlined instance of a function.
struct Frame<'m> {
    function: &'m Function,
    slot_base: Slot,
    label_base: u32,
    /// Address of each variable of the function, in its own space.
    addresses: Vec<u64>,
    /// Where `ret` goes; None in the kernel itself.
    end_label: Option<u32>,
}

/// One opcode, split at its dots.
struct Opcode<'a> {
    name: &'a str,
    suffixes: Vec<&'a str>,
    line: u32,
    text: &'a str,
}

impl Opcode<'_> {
    fn has(&self, suffix: &str) -> bool {
        self.suffixes.contains(&suffix)
    }

    /// The last type suffix.
    fn kind(&self) -> Option<Type> {
        self.suffixes.iter().rev().find_map(|suffix| Type::parse(suffix))
    }

    fn unknown<T>(&self, why: &str) -> Result<T, Refusal> {
        Err(Refusal::unknown(self.line, format!("`{}` is not implemented{why}", self.text)))
    }
}

struct Decoder<'m> {
    module: &'m Module,
    globals: &'m HashMap<String, u64>,
    shared: SharedLayout,
    insts: Vec<Inst>,
    slot_names: Vec<String>,
    slot_kinds: Vec<Type>,
    constants: HashMap<u64, Slot>,
    specials: HashMap<Special, Slot>,
    /// Program counter of each label once it is known.
    labels: Vec<Option<u32>>,
    /// Target lists of `brx.idx`, by label.
    tables: HashMap<u32, Vec<u32>>,
    calls: Vec<String>,
    local_bytes: usize,
    granule: usize,
    carry: Slot,
}

/// Decodes the kernel `name`. `globals` holds the addresses of the module's variables.
pub(crate) fn decode(
    module: &Module,
    globals: &HashMap<String, u64>,
    lines: &Arc<Vec<String>>,
    name: &str,
) -> Result<Program, Refusal> {
    let entry = module.functions.get(name).filter(|function| function.is_entry).ok_or_else(|| {
        let known = module.entries.join(", ");
        let mangled =
            module.entries.iter().any(|entry| entry.starts_with(&format!("_Z{}{name}", name.len())));
        let known = if mangled { known + " (declare it extern \"C\" to keep its name)" } else { known };
        Refusal::new(Complaint::Launch, format!("the module has no kernel `{name}`; it has: {known}"))
    })?;
    let mut decoder = Decoder {
        module,
        globals,
        shared: shared_layout(module, entry),
        insts: Vec::new(),
        slot_names: Vec::new(),
        slot_kinds: Vec::new(),
        constants: HashMap::new(),
        specials: HashMap::new(),
        labels: Vec::new(),
        tables: HashMap::new(),
        calls: Vec::new(),
        local_bytes: LOCAL_BASE as usize,
        granule: 4,
        carry: 0,
    };
    decoder.carry = decoder.new_slot("carry flag".to_owned(), Type::Pred);
    let mut parameters = Vec::new();
    let mut parameter_bytes = 0;
    let mut addresses = vec![0; entry.variables.len()];
    for formal in &entry.parameters {
        if let Formal::Variable(index) = formal {
            let variable = &entry.variables[*index as usize];
            parameter_bytes = align_up(parameter_bytes, variable.align);
            addresses[*index as usize] = parameter_bytes as u64;
            let name = variable.name.clone();
            let is_float = variable.element.is_float();
            parameters.push(Parameter { name, offset: parameter_bytes, bytes: variable.bytes, is_float });
            parameter_bytes += variable.bytes;
        }
    }
    decoder.inline(entry, addresses, HashMap::new(), None)?;
    decoder.push(Op::Exit, Class::Control, 0, (0, 0));
    decoder.resolve_labels()?;
    let bypasses = bypass::find(&mut decoder.insts);
    Ok(Program {
        name: name.to_owned(),
        insts: decoder.insts,
        lines: lines.clone(),
        files: module.files.clone(),
        slot_names: decoder.slot_names,
        constants: decoder.constants.iter().map(|(&value, &slot)| (slot, value)).collect(),
        specials: decoder.specials.iter().map(|(&special, &slot)| (slot, special)).collect(),
        parameters,
        parameter_bytes,
        static_shared: decoder.shared.static_bytes,
        dynamic_shared: decoder.shared.dynamic_offset,
        local_bytes: decoder.local_bytes,
        granule: decoder.granule,
        max_threads: entry.max_threads,
        bypasses,
        shared_names: Arc::new(decoder.shared.names),
    })
}

impl<'m> Decoder<'m> {
    fn new_slot(&mut self, name: String, kind: Type) -> Slot {
        self.slot_names.push(name);
        self.slot_kinds.push(kind);
        self.slot_names.len() as Slot - 1
    }

    fn constant(&mut self, value: u64) -> Slot {
        if let Some(&slot) = self.constants.get(&value) {
            return slot;
        }
        let slot = self.new_slot(format!("{value:#x}"), Type::B64);
        self.constants.insert(value, slot);
        slot
    }

    fn special(&mut self, special: Special, name: &str) -> Slot {
        if let Some(&slot) = self.specials.get(&special) {
            return slot;
        }
        let slot = self.new_slot(name.to_owned(), Type::B64);
        self.specials.insert(special, slot);
        slot
    }

    fn push(&mut self, op: Op, class: Class, line: u32, source: (u32, u32)) {
        self.insts.push(Inst { op, guard: NONE, negate: false, class, line, source });
    }

    /// Emits the body of a function. `aliases` maps its formal registers to slots of the caller.
    fn inline(
        &mut self,
        function: &'m Function,
        mut addresses: Vec<u64>,
        aliases: HashMap<u32, Slot>,
        end_label: Option<u32>,
    ) -> Result<(), Refusal> {
        if self.calls.contains(&function.name) {
            let text = format!("`{}` calls itself; recursion is not implemented", function.name);
            return Err(Refusal::unknown(0, text));
        }
        self.calls.push(function.name.clone());
        for (index, variable) in function.variables.iter().enumerate() {
            let key = (function.name.clone(), index as u32);
            if let Some(&address) = self.shared.scoped.get(&key) {
                addresses[index] = address;
            } else if variable.space == Space::Local && addresses[index] == 0 {
                self.local_bytes = align_up(self.local_bytes, variable.align);
                addresses[index] = self.local_bytes as u64;
                self.local_bytes += variable.bytes;
            }
        }
        let slot_base = self.slot_names.len() as Slot;
        for (name, kind) in &function.registers {
            self.new_slot(name.clone(), *kind);
        }
        let label_base = self.labels.len() as u32;
        self.labels.resize(self.labels.len() + function.labels.len(), None);
        let frame = Frame { function, slot_base, label_base, addresses, end_label };
        for pair in function.body.windows(2) {
            if let [Statement::Label(label), Statement::Instruction(list)] = pair
                && list.opcode == ".branchtargets"
            {
                let targets = list.operands.iter().filter_map(|operand| match operand {
                    Operand::Label(target) => Some(label_base + target),
                    _ => None,
                });
                self.tables.insert(label_base + label, targets.collect());
            }
        }
        for (formal, slot) in aliases {
            // A formal register receives the caller's value by a move.
            let copy = crate::lanes::lanewise!(u64, u64; a => a);
            let src = [slot; 4];
            self.push(
                Op::Lanewise { kernel: copy, dst: slot_base + formal, dst2: NONE, src },
                Class::Move,
                0,
                (0, 0),
            );
        }
        for statement in &function.body {
            match statement {
                Statement::Label(label) => {
                    self.labels[(label_base + label) as usize] = Some(self.insts.len() as u32);
                }
                Statement::Instruction(instruction) => self.instruction(&frame, instruction)?,
            }
        }
        self.calls.pop();
        Ok(())
    }

    fn instruction(&mut self, frame: &Frame<'m>, instruction: &'m Instruction) -> Result<(), Refusal> {
        let mut parts = instruction.opcode.split('.');
        let opcode = Opcode {
            name: parts.next().unwrap_or_default(),
            suffixes: parts.collect(),
            line: instruction.line,
            text: &instruction.opcode,
        };
        if instruction.opcode.starts_with('.') {
            return if instruction.opcode == ".branchtargets" || instruction.opcode == ".calltargets" {
                Ok(())
            } else {
                opcode.unknown("")
            };
        }
        let first = self.insts.len();
        let (op, class) = match opcode.name {
            "call" => return self.call(frame, instruction, &opcode),
            "ret" => match frame.end_label {
                Some(label) => (Op::Branch { target: label, bypasses: [NONE; 2] }, Class::Control),
                None => (Op::Exit, Class::Control),
            },
            "exit" => (Op::Exit, Class::Control),
            "trap" => (Op::Trap("the kernel executed `trap`".to_owned()), Class::Control),
            "bra" => match instruction.operands.first() {
                Some(Operand::Label(label)) => {
                    (Op::Branch { target: frame.label_base + label, bypasses: [NONE; 2] }, Class::Control)
                }
                _ => return opcode.unknown(" with this target"),
            },
            "brx" => {
                let index = self.operand(frame, &instruction.operands[0], Type::U32, &opcode)?;
                let targets = match instruction.operands.get(1) {
                    Some(Operand::Label(label)) => self.tables.get(&(frame.label_base + label)).cloned(),
                    _ => None,
                };
                let Some(targets) = targets else { return opcode.unknown(" without a list of targets") };
                (Op::BranchTable { index, targets: targets.into() }, Class::Control)
            }
            "nanosleep" | "pmevent" | "prefetch" | "prefetchu" | "discard" | "applypriority" | "brkpt"
            | "griddepcontrol" | "setmaxnreg" => (Op::Nothing, Class::Other),
            "createpolicy" => {
                let dst = destination(frame, &instruction.operands[0], &opcode)?;
                let zero = self.constant(0);
                let kernel = crate::lanes::lanewise!(u64, u64; a => a);
                (Op::Lanewise { kernel, dst, dst2: NONE, src: [zero; 4] }, Class::Other)
            }
            _ => match self.memory(frame, instruction, &opcode)? {
                Some(found) => found,
                None => match self.collective(frame, instruction, &opcode)? {
                    Some(found) => found,
                    None => match self.matrix(frame, instruction, &opcode)? {
                        Some(found) => found,
                        None => self.arithmetic(frame, instruction, &opcode)?,
                    },
                },
            },
        };
        self.push(op, class, instruction.line, instruction.source);
        if let Some((register, negate)) = instruction.guard {
            for inst in &mut self.insts[first..] {
                inst.guard = frame.slot_base + register;
                inst.negate = negate;
            }
        }
        Ok(())
    }

    /// `call (results), function, (arguments)`: variables of the caller become the callee's parameters.
    fn call(
        &mut self,
        frame: &Frame<'m>,
        instruction: &'m Instruction,
        opcode: &Opcode,
    ) -> Result<(), Refusal> {
        if instruction.guard.is_some() {
            return opcode.unknown(" under a guard");
        }
        let (results, name, arguments) = match instruction.operands.as_slice() {
            [Operand::List(results), Operand::Symbol(name, _), Operand::List(arguments), ..] => {
                (results.as_slice(), name, arguments.as_slice())
            }
            [Operand::List(results), Operand::Symbol(name, _)] => (results.as_slice(), name, [].as_slice()),
            [Operand::Symbol(name, _), Operand::List(arguments), ..] => {
                ([].as_slice(), name, arguments.as_slice())
            }
            [Operand::Symbol(name, _)] => ([].as_slice(), name, [].as_slice()),
            _ => return opcode.unknown(" through a pointer"),
        };
        let (line, source) = (instruction.line, instruction.source);
        if name == "vprintf" {
            // Printing is ignored; its result, the count of characters, is zero.
            if let Some(Operand::Variable(index, _)) = results.first() {
                let op = self.store_local(frame.addresses[*index as usize], 0);
                self.push(op, Class::Other, line, source);
            }
            return Ok(());
        }
        if matches!(name.as_str(), "__assertfail" | "__assert_fail") {
            self.push(Op::Trap("an assertion failed".to_owned()), Class::Control, line, source);
            return Ok(());
        }
        let Some(callee) = self.module.functions.get(name).filter(|function| function.has_body) else {
            return opcode.unknown(&format!(" for `{name}`, which the module does not define"));
        };
        let mut addresses = vec![0; callee.variables.len()];
        let mut aliases = HashMap::new();
        let formals = callee.parameters.iter().chain(&callee.results);
        for (formal, actual) in formals.zip(arguments.iter().chain(results)) {
            match (formal, actual) {
                (Formal::Variable(formal), Operand::Variable(actual, _)) => {
                    addresses[*formal as usize] = frame.addresses[*actual as usize];
                }
                (Formal::Register(formal), actual) if callee.results.is_empty() => {
                    let kind = callee.registers[*formal as usize].1;
                    aliases.insert(*formal, self.operand(frame, actual, kind, opcode)?);
                }
                _ => return opcode.unknown(" with these arguments"),
            }
        }
        let end = self.labels.len() as u32;
        self.labels.push(None);
        self.inline(callee, addresses, aliases, Some(end))?;
        self.labels[end as usize] = Some(self.insts.len() as u32);
        Ok(())
    }

    fn resolve_labels(&mut self) -> Result<(), Refusal> {
        let labels = &self.labels;
        let find = |label: u32, line: u32| {
            labels[label as usize].ok_or_else(|| Refusal::syntax(line, "a branch leads to no instruction"))
        };
        for inst in &mut self.insts {
            let line = inst.line;
            match &mut inst.op {
                Op::Branch { target, .. } => *target = find(*target, line)?,
                Op::BranchTable { targets, .. } => {
                    for target in targets {
                        *target = find(*target, line)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}
