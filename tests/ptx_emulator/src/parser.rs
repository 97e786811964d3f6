//! Tokens → module: directives, variables and functions. Bodies are read by `parser::body`.

mod body;

use crate::lexer::{Placed, Token, tokens};
use crate::refusal::Refusal;
use crate::syntax::{Formal, Function, Initial, Module, SourceLine, Variable};
use crate::types::{Space, Type};
use std::collections::HashMap;

/// What a name means inside a function.
#[derive(Clone, Copy)]
enum Meaning {
    Register(u32),
    Variable(u32),
    Label(u32),
}

struct Parser {
    tokens: Vec<Placed>,
    at: usize,
    module: Module,
    /// Innermost scope last.
    scopes: Vec<HashMap<String, Meaning>>,
    source: SourceLine,
}

/// Reads a whole module.
pub(crate) fn parse(text: &str) -> Result<Module, Refusal> {
    let mut parser = Parser {
        tokens: tokens(text)?,
        at: 0,
        module: Module::default(),
        scopes: Vec::new(),
        source: (0, 0),
    };
    while parser.at < parser.tokens.len() {
        parser.directive()?;
    }
    Ok(parser.module)
}

impl Parser {
    fn line(&self) -> u32 {
        let last = self.tokens.len().saturating_sub(1);
        self.tokens.get(self.at.min(last)).map_or(0, |placed| placed.line)
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|placed| &placed.token)
    }

    fn peek_word(&self) -> Option<&str> {
        match self.peek() {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    fn wrong<T>(&self, expected: &str) -> Result<T, Refusal> {
        let found = self.peek().map_or("the end".to_owned(), |token| format!("{token:?}"));
        Err(Refusal::syntax(self.line(), format!("expected {expected}, found {found}")))
    }

    fn mark(&mut self, c: char) -> bool {
        let matches = self.peek() == Some(&Token::Mark(c));
        self.at += usize::from(matches);
        matches
    }

    fn expect(&mut self, c: char) -> Result<(), Refusal> {
        if self.mark(c) { Ok(()) } else { self.wrong(&format!("`{c}`")) }
    }

    fn word(&mut self) -> Result<String, Refusal> {
        match self.peek() {
            Some(Token::Word(word)) => {
                let word = word.clone();
                self.at += 1;
                Ok(word)
            }
            _ => self.wrong("a name"),
        }
    }

    fn integer(&mut self) -> Result<u64, Refusal> {
        let negative = self.mark('-');
        match self.peek() {
            Some(&Token::Integer(value)) => {
                self.at += 1;
                Ok(if negative { value.wrapping_neg() } else { value })
            }
            _ => self.wrong("an integer"),
        }
    }

    /// Skips to just after the next `;`.
    fn skip_statement(&mut self) {
        while self.at < self.tokens.len() && !self.mark(';') {
            self.at += 1;
        }
    }

    fn directive(&mut self) -> Result<(), Refusal> {
        let word = self.word()?;
        match word.as_str() {
            ".version" => self.at += 1,
            ".target" => {
                self.module.target = self.word()?;
                while self.mark(',') {
                    self.word()?;
                }
            }
            ".address_size" => {
                if self.integer()? != 64 {
                    return Err(Refusal::syntax(self.line(), "only 64-bit addresses are supported"));
                }
            }
            ".file" => self.file()?,
            ".section" => self.skip_braces(),
            ".loc" => self.location()?,
            ".visible" | ".extern" | ".weak" | ".common" => {}
            ".entry" | ".func" => self.function(word == ".entry")?,
            ".alias" | ".pragma" => self.skip_statement(),
            ".global" | ".const" | ".shared" => {
                let space = match word.as_str() {
                    ".global" => Space::Global,
                    ".const" => Space::Const,
                    _ => Space::Shared,
                };
                self.variables(space)?;
            }
            "" => {}
            other => return Err(Refusal::syntax(self.line(), format!("unknown directive `{other}`"))),
        }
        Ok(())
    }

    fn skip_braces(&mut self) {
        while self.at < self.tokens.len() && !self.mark('{') {
            self.at += 1;
        }
        let mut depth = 1;
        while self.at < self.tokens.len() && depth > 0 {
            depth += i32::from(self.peek() == Some(&Token::Mark('{')));
            depth -= i32::from(self.peek() == Some(&Token::Mark('}')));
            self.at += 1;
        }
    }

    fn file(&mut self) -> Result<(), Refusal> {
        let index = self.integer()? as u32;
        if let Some(Token::Text(name)) = self.peek() {
            let short = name.rsplit('/').next().unwrap_or(name).to_owned();
            self.module.files.insert(index, short);
            self.at += 1;
        }
        while self.mark(',') {
            self.at += 1;
        }
        Ok(())
    }

    /// `.loc file line column [, function_name label, inlined_at file line column]`
    fn location(&mut self) -> Result<(), Refusal> {
        let file = self.integer()? as u32;
        let line = self.integer()? as u32;
        self.integer()?;
        self.source = (file, line);
        while self.mark(',') {
            match self.word()?.as_str() {
                "function_name" => {
                    self.word()?;
                    if self.mark('+') {
                        self.integer()?;
                    }
                }
                _ => {
                    for _ in 0..3 {
                        self.integer()?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The variables of one declaration, added to the innermost scope or to the module.
    fn variables(&mut self, space: Space) -> Result<(), Refusal> {
        let first = self.variable(space)?;
        let mut all = vec![first];
        while self.mark(',') {
            let mut next = all[0].clone();
            next.name = self.word()?;
            self.dimensions(&mut next)?;
            all.push(next);
        }
        self.expect(';')?;
        for variable in all {
            self.module.variables.push(variable);
        }
        Ok(())
    }

    /// `[.align n] .type name[dims] [= initial]`, after the state space.
    fn variable(&mut self, space: Space) -> Result<Variable, Refusal> {
        let mut align = None;
        let mut vector = 1;
        let element = loop {
            let word = self.word()?;
            match word.as_str() {
                ".align" => align = Some(self.integer()? as usize),
                ".attribute" => {
                    while !self.mark(')') {
                        self.at += 1;
                    }
                }
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                ".ptr" => {
                    while self.peek_word().is_some_and(|next| next.starts_with('.')) {
                        if self.word()? == ".align" {
                            self.integer()?;
                        }
                    }
                    return self.wrong("a type before `.ptr`");
                }
                other => match Type::parse(other.trim_start_matches('.')) {
                    Some(element) => break element,
                    None => return Err(Refusal::syntax(self.line(), format!("`{other}` is no type"))),
                },
            }
        };
        // Parameters of kernels may say what they point to: `.param .u64 .ptr .align 1 name`.
        while self.peek_word().is_some_and(|next| next.starts_with('.')) {
            if self.word()? == ".align" {
                self.integer()?;
            }
        }
        let bytes = element.bytes() * vector;
        let mut variable = Variable {
            name: self.word()?,
            space,
            align: align.unwrap_or(bytes),
            element,
            bytes,
            initial: Vec::new(),
        };
        self.dimensions(&mut variable)?;
        Ok(variable)
    }

    fn dimensions(&mut self, variable: &mut Variable) -> Result<(), Refusal> {
        let mut count = 1;
        let mut unsized_array = false;
        while self.mark('[') {
            if self.mark(']') {
                unsized_array = true;
                continue;
            }
            count *= self.integer()? as usize;
            self.expect(']')?;
        }
        variable.bytes = if unsized_array { 0 } else { variable.bytes * count };
        if self.mark('=') {
            self.initial(&mut variable.initial)?;
            if unsized_array {
                variable.bytes = variable.initial.len() * variable.element.bytes();
            }
        }
        Ok(())
    }

    fn initial(&mut self, into: &mut Vec<Initial>) -> Result<(), Refusal> {
        if self.mark('{') {
            while !self.mark('}') {
                self.initial(into)?;
                self.mark(',');
            }
            return Ok(());
        }
        match self.peek().cloned() {
            Some(Token::Integer(_) | Token::Mark('-')) => into.push(Initial::Bits(self.integer()?)),
            Some(Token::Float32(bits)) => {
                self.at += 1;
                into.push(Initial::Bits(u64::from(bits)));
            }
            Some(Token::Float64(bits)) => {
                self.at += 1;
                into.push(Initial::Bits(bits));
            }
            Some(Token::Word(name)) => {
                self.at += 1;
                if name == "generic" {
                    self.expect('(')?;
                    self.initial(into)?;
                    return self.expect(')');
                }
                let offset = if self.mark('+') { self.integer()? as i64 } else { 0 };
                into.push(Initial::Address(name, offset));
            }
            _ => return self.wrong("an initial value"),
        }
        Ok(())
    }

    /// A parenthesised list of formal parameters.
    fn formals(&mut self, function: &mut Function, space: Space) -> Result<Vec<Formal>, Refusal> {
        let mut formals = Vec::new();
        self.expect('(')?;
        while !self.mark(')') {
            let kind = self.word()?;
            let variable = self.variable(space)?;
            let scope = self.scopes.last_mut().expect("a function opens a scope");
            if kind == ".reg" {
                let index = function.registers.len() as u32;
                scope.insert(variable.name.clone(), Meaning::Register(index));
                function.registers.push((variable.name, variable.element));
                formals.push(Formal::Register(index));
            } else {
                let index = function.variables.len() as u32;
                scope.insert(variable.name.clone(), Meaning::Variable(index));
                function.variables.push(variable);
                formals.push(Formal::Variable(index));
            }
            self.mark(',');
        }
        Ok(formals)
    }

    fn function(&mut self, is_entry: bool) -> Result<(), Refusal> {
        let mut function = Function { is_entry, ..Function::default() };
        self.scopes = vec![HashMap::new()];
        // A device function keeps its parameters in memory of the thread, a kernel in the launch's.
        let space = if is_entry { Space::Param } else { Space::Local };
        if self.peek() == Some(&Token::Mark('(')) {
            function.results = self.formals(&mut function, space)?;
        }
        while self.peek_word().is_some_and(|word| word.starts_with('.')) {
            self.word()?;
        }
        function.name = self.word()?;
        if self.peek() == Some(&Token::Mark('(')) {
            function.parameters = self.formals(&mut function, space)?;
        }
        loop {
            match self.peek() {
                Some(Token::Mark(';')) => {
                    self.at += 1;
                    break;
                }
                Some(Token::Mark('{')) => {
                    self.at += 1;
                    function.has_body = true;
                    self.body(&mut function)?;
                    break;
                }
                Some(Token::Word(word)) => {
                    let bound = matches!(word.as_str(), ".maxntid" | ".reqntid");
                    self.at += 1;
                    let mut product = 1;
                    while let Some(&Token::Integer(value)) = self.peek() {
                        product *= value as u32;
                        self.at += 1;
                        self.mark(',');
                    }
                    if bound {
                        function.max_threads = Some(product);
                    }
                }
                Some(Token::Text(_) | Token::Mark(',')) => self.at += 1,
                _ => return self.wrong("the body of a function"),
            }
        }
        self.scopes.clear();
        if is_entry {
            self.module.entries.push(function.name.clone());
        }
        // A prototype never replaces a definition.
        if function.has_body || !self.module.functions.contains_key(&function.name) {
            self.module.functions.insert(function.name.clone(), function);
        }
        Ok(())
    }
}
