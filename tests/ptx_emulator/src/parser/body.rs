//! The body of a function: declarations, labels and instructions, with nested scopes.

use super::{Meaning, Parser};
use crate::lexer::Token;
use crate::refusal::Refusal;
use crate::syntax::{Function, Instruction, Operand, Statement};
use crate::types::{Space, Type};
use std::collections::HashMap;

impl Parser {
    /// Reads up to and including the closing brace of the function.
    pub(super) fn body(&mut self, function: &mut Function) -> Result<(), Refusal> {
        let mut depth = 1;
        self.open_scope(function);
        while depth > 0 {
            if self.mark('{') {
                depth += 1;
                self.open_scope(function);
            } else if self.mark('}') {
                depth -= 1;
                self.scopes.pop();
            } else if !self.mark(';') {
                self.statement(function)?;
            }
            if self.at >= self.tokens.len() && depth > 0 {
                return self.wrong("`}`");
            }
        }
        Ok(())
    }

    /// Opens a scope and declares its labels, since branches may name them before they stand.
    fn open_scope(&mut self, function: &mut Function) {
        let mut scope = HashMap::new();
        let mut depth = 1;
        let mut at = self.at;
        while depth > 0 && at + 1 < self.tokens.len() {
            match (&self.tokens[at].token, &self.tokens[at + 1].token) {
                (Token::Mark('{'), _) => depth += 1,
                (Token::Mark('}'), _) => depth -= 1,
                (Token::Word(name), Token::Mark(':')) if depth == 1 => {
                    scope.insert(name.clone(), Meaning::Label(function.labels.len() as u32));
                    function.labels.push(name.clone());
                }
                _ => {}
            }
            at += 1;
        }
        self.scopes.push(scope);
    }

    fn lookup(&self, name: &str) -> Option<Meaning> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    fn declare(&mut self, name: String, meaning: Meaning) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name, meaning);
        }
    }

    fn statement(&mut self, function: &mut Function) -> Result<(), Refusal> {
        if self.peek() == Some(&Token::Mark('@')) {
            return self.instruction(function);
        }
        let Some(word) = self.peek_word().map(str::to_owned) else {
            return self.wrong("a statement");
        };
        match word.as_str() {
            ".reg" => {
                self.at += 1;
                self.registers(function)
            }
            ".local" | ".shared" | ".param" => {
                self.at += 1;
                let space = if word == ".shared" { Space::Shared } else { Space::Local };
                let variable = self.variable(space)?;
                self.expect(';')?;
                let index = function.variables.len() as u32;
                self.declare(variable.name.clone(), Meaning::Variable(index));
                function.variables.push(variable);
                Ok(())
            }
            ".loc" => {
                self.at += 1;
                self.location()
            }
            ".pragma" | ".alias" => {
                self.skip_statement();
                Ok(())
            }
            ".file" => {
                self.at += 1;
                self.file()
            }
            _ => {
                if self.tokens.get(self.at + 1).map(|placed| &placed.token) == Some(&Token::Mark(':')) {
                    self.at += 2;
                    if self.peek_word().is_some_and(|next| next.starts_with(".callprototype")) {
                        self.skip_statement();
                    } else if let Some(Meaning::Label(label)) = self.lookup(&word) {
                        function.body.push(Statement::Label(label));
                    }
                    return Ok(());
                }
                self.instruction(function)
            }
        }
    }

    /// `.reg .type a, b<n>;`
    fn registers(&mut self, function: &mut Function) -> Result<(), Refusal> {
        let word = self.word()?;
        let Some(element) = Type::parse(word.trim_start_matches('.')) else {
            return Err(Refusal::syntax(self.line(), format!("`{word}` is no type of a register")));
        };
        loop {
            let name = self.word()?;
            if self.mark('<') {
                let count = self.integer()?;
                self.expect('>')?;
                for index in 0..count {
                    self.register(function, format!("{name}{index}"), element);
                }
            } else {
                self.register(function, name, element);
            }
            if !self.mark(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn register(&mut self, function: &mut Function, name: String, element: Type) {
        let index = function.registers.len() as u32;
        function.registers.push((name.clone(), element));
        self.declare(name, Meaning::Register(index));
    }

    fn instruction(&mut self, function: &mut Function) -> Result<(), Refusal> {
        let line = self.line();
        let guard = if self.mark('@') {
            let negated = self.mark('!');
            let name = self.word()?;
            match self.lookup(&name) {
                Some(Meaning::Register(index)) => Some((index, negated)),
                _ => return Err(Refusal::syntax(line, format!("guard `{name}` is no register"))),
            }
        } else {
            None
        };
        let opcode = self.word()?;
        let mut operands = Vec::new();
        while !self.mark(';') {
            operands.push(self.operand()?);
            if !self.mark(',') && self.peek() != Some(&Token::Mark(';')) {
                return self.wrong("`,` or `;`");
            }
        }
        let source = self.source;
        function.body.push(Statement::Instruction(Instruction { guard, opcode, operands, line, source }));
        Ok(())
    }

    fn operand(&mut self) -> Result<Operand, Refusal> {
        let first = self.simple_operand()?;
        if self.mark('|') {
            let second = self.simple_operand()?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn list(&mut self, close: char) -> Result<Vec<Operand>, Refusal> {
        let mut elements = Vec::new();
        while !self.mark(close) {
            elements.push(self.operand()?);
            self.mark(',');
        }
        Ok(elements)
    }

    fn simple_operand(&mut self) -> Result<Operand, Refusal> {
        if self.mark('!') {
            return Ok(Operand::Not(Box::new(self.simple_operand()?)));
        }
        if self.mark('{') {
            return Ok(Operand::Vector(self.list('}')?));
        }
        if self.mark('(') {
            return Ok(Operand::List(self.list(')')?));
        }
        if self.mark('[') {
            let base = self.simple_operand()?;
            // Coordinates of textures and the like; their instructions are refused by name later.
            while self.mark(',') {
                self.operand()?;
            }
            let offset = if self.mark('+') { self.integer()? as i64 } else { 0 };
            if self.mark('-') {
                let offset = -(self.integer()? as i64);
                self.expect(']')?;
                return Ok(Operand::Address(Box::new(base), offset));
            }
            self.expect(']')?;
            return Ok(Operand::Address(Box::new(base), offset));
        }
        match self.peek().cloned() {
            Some(Token::Mark('-')) => {
                self.at += 1;
                match self.simple_operand()? {
                    Operand::Integer(value) => Ok(Operand::Integer(value.wrapping_neg())),
                    Operand::Float64(bits) => Ok(Operand::Float64(bits ^ (1 << 63))),
                    _ => self.wrong("a number after `-`"),
                }
            }
            Some(Token::Mark('~')) => {
                self.at += 1;
                match self.simple_operand()? {
                    Operand::Integer(value) => Ok(Operand::Integer(!value)),
                    _ => self.wrong("an integer after `~`"),
                }
            }
            Some(Token::Integer(value)) => {
                self.at += 1;
                Ok(Operand::Integer(value))
            }
            Some(Token::Float32(bits)) => {
                self.at += 1;
                Ok(Operand::Float32(bits))
            }
            Some(Token::Float64(bits)) => {
                self.at += 1;
                Ok(Operand::Float64(bits))
            }
            Some(Token::Word(name)) => {
                self.at += 1;
                self.name(name)
            }
            _ => self.wrong("an operand"),
        }
    }

    fn name(&mut self, name: String) -> Result<Operand, Refusal> {
        match self.lookup(&name) {
            Some(Meaning::Register(index)) => Ok(Operand::Register(index)),
            Some(Meaning::Label(label)) => Ok(Operand::Label(label)),
            Some(Meaning::Variable(index)) => Ok(Operand::Variable(index, self.offset()?)),
            None if name == "_" => Ok(Operand::Sink),
            None if name == "WARP_SZ" => Ok(Operand::Integer(32)),
            None => {
                let offset = self.offset()?;
                Ok(Operand::Symbol(name, offset))
            }
        }
    }

    /// `+ n` after a variable outside brackets.
    fn offset(&mut self) -> Result<i64, Refusal> {
        if self.mark('+') {
            return Ok(self.integer()? as i64);
        }
        Ok(0)
    }
}
