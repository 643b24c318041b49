//! Control flow: basic blocks, edges, and which blocks a branch decides over.

use std::collections::BTreeSet;
use std::ops::Range;

use petgraph::algo::dominators::simple_fast;
use petgraph::graph::{DiGraph, NodeIndex};

use super::opcodes::Class;
use super::operand::Operand;
use super::parse::{Instruction, Section};

/// The basic blocks of a section, in the order of its code.
#[derive(Debug)]
pub struct Flow {
    /// Each block's instructions.
    pub blocks: Vec<Range<usize>>,
    /// Each block's successors.
    pub successors: Vec<Vec<usize>>,
    /// The block of each instruction.
    pub block_of: Vec<usize>,
    /// Whether some threads may end at the end of the block while others go on.
    exits_in_part: Vec<bool>,
}

impl Flow {
    /// Cuts a section into blocks.
    pub fn of(section: &Section) -> Self {
        let code = &section.instructions;
        let next = successors_of_instructions(code);
        let mut leader = vec![false; code.len()];
        if let Some(first) = leader.first_mut() {
            *first = true;
        }
        for (index, followers) in next.iter().enumerate() {
            if followers.as_slice() != [index + 1] || code[index].opcode.class == Class::Exit {
                followers.iter().for_each(|&follower| leader[follower] = true);
                if let Some(behind) = leader.get_mut(index + 1) {
                    *behind = true;
                }
            }
        }
        let starts: Vec<usize> = (0..code.len()).filter(|&index| leader[index]).collect();
        let ends = starts.iter().skip(1).copied().chain([code.len()]);
        let blocks: Vec<Range<usize>> = starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect();
        let mut block_of = vec![0; code.len()];
        for (block, range) in blocks.iter().enumerate() {
            block_of[range.clone()].fill(block);
        }
        let successors: Vec<Vec<usize>> =
            blocks.iter().map(|range| next[range.end - 1].iter().map(|&index| block_of[index]).collect()).collect();
        let ends = blocks.iter().map(|range| &code[range.end - 1]);
        let exits_in_part = ends.map(|end| end.opcode.class == Class::Exit && end.guard.is_some()).collect();
        Self { blocks, successors, block_of, exits_in_part }
    }

    /// Forward data flow by a worklist (Kildall, 1973): the state at the entry of each block that can be reached.
    ///
    /// `run` takes a state through a block; `pass` takes it over the edge from one block into what is known at the
    /// entry of another, and says whether that changed.
    pub fn forward<S: Clone>(
        &self,
        first: S,
        mut run: impl FnMut(usize, &mut S),
        mut pass: impl FnMut(usize, usize, &S, &mut Option<S>) -> bool,
    ) -> Vec<Option<S>> {
        let mut entries: Vec<Option<S>> = vec![None; self.blocks.len()];
        let mut work = BTreeSet::new();
        if let Some(entry) = entries.first_mut() {
            *entry = Some(first);
            work.insert(0);
        }
        while let Some(block) = work.pop_first() {
            let Some(mut state) = entries[block].clone() else { continue };
            run(block, &mut state);
            for &follower in &self.successors[block] {
                if pass(block, follower, &state, &mut entries[follower]) {
                    work.insert(follower);
                }
            }
        }
        entries
    }

    /// Each instruction's successors.
    pub fn steps(&self) -> Vec<Vec<usize>> {
        let mut next: Vec<Vec<usize>> = (0..self.block_of.len()).map(|index| vec![index + 1]).collect();
        for (block, range) in self.blocks.iter().enumerate() {
            next[range.end - 1] = self.successors[block].iter().map(|&follower| self.blocks[follower].start).collect();
        }
        next
    }

    /// Whether each block can be executed at all.
    pub fn live(&self) -> Vec<bool> {
        let entry: &[usize] = if self.blocks.is_empty() { &[] } else { &[0] };
        closure(&self.successors, entry, |_| false)
    }

    /// Each block's immediate post-dominator; `None` where paths from it meet only at the end.
    pub fn post_dominators(&self) -> Vec<Option<usize>> {
        let mut graph = DiGraph::<(), ()>::new();
        let nodes: Vec<NodeIndex> = self.blocks.iter().map(|_| graph.add_node(())).collect();
        let end = graph.add_node(());
        for (block, followers) in self.successors.iter().enumerate() {
            for &follower in followers {
                graph.add_edge(nodes[follower], nodes[block], ());
            }
            if followers.is_empty() || self.exits_in_part[block] {
                graph.add_edge(end, nodes[block], ());
            }
        }
        let dominators = simple_fast(&graph, end);
        let of = |&node: &NodeIndex| dominators.immediate_dominator(node).filter(|&d| d != end).map(NodeIndex::index);
        nodes.iter().map(of).collect()
    }
}

fn successors_of_instructions(code: &[Instruction]) -> Vec<Vec<usize>> {
    let of = |(index, instruction): (usize, &Instruction)| {
        let mut followers = match instruction.opcode.class {
            Class::Branch | Class::BranchIndirect | Class::Call => instruction.targets.clone(),
            // Threads that do not take part go on behind what the others do together.
            Class::Steer if instruction.has("COLLECTIVE") => instruction.targets.clone(),
            _ => Vec::new(),
        };
        if falls_through(instruction) && index + 1 < code.len() {
            followers.push(index + 1);
        }
        followers
    };
    let mut next: Vec<Vec<usize>> = code.iter().enumerate().map(of).collect();
    let calls = |index: &usize| code[*index].opcode.class == Class::Call && index + 1 < code.len();
    let returns: Vec<(usize, usize)> = (0..code.len())
        .filter(calls)
        .flat_map(|call| returns_to(code, &next, call).into_iter().map(move |from| (from, call + 1)))
        .collect();
    returns.into_iter().for_each(|(from, to)| next[from].push(to));
    for followers in &mut next {
        followers.sort_unstable();
        followers.dedup();
    }
    next
}

/// The returns that may come back from a call: those that its target reaches.
fn returns_to(code: &[Instruction], next: &[Vec<usize>], call: usize) -> Vec<usize> {
    let reached = closure(next, &code[call].targets, |_| false);
    (0..code.len()).filter(|&index| reached[index] && code[index].opcode.class == Class::Return).collect()
}

/// What can be reached along edges, without going into what `stop` names.
pub fn closure(edges: &[Vec<usize>], starts: &[usize], stop: impl Fn(usize) -> bool) -> Vec<bool> {
    let mut seen = vec![false; edges.len()];
    let mut work = starts.to_vec();
    while let Some(at) = work.pop() {
        if !stop(at) && !std::mem::replace(&mut seen[at], true) {
            work.extend(edges[at].iter().copied());
        }
    }
    seen
}

/// Whether what stands behind an instruction may be executed after it. A call is taken to come back.
fn falls_through(instruction: &Instruction) -> bool {
    let conditional = instruction.guard.is_some()
        || instruction.operands.iter().any(Operand::is_predicate)
        || instruction.has("DIV")
        || instruction.has("CONV");
    match instruction.opcode.class {
        Class::Branch => conditional,
        Class::BranchIndirect | Class::Return | Class::Exit => instruction.guard.is_some(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn flow(lines: &[&str]) -> Flow {
        let mut text = ".section .text.k,\"ax\"\n".to_owned();
        for (index, line) in lines.iter().enumerate() {
            let (label, code) = line.split_once(": ").unwrap_or(("", line));
            if !label.is_empty() {
                text += &format!("{label}:\n");
            }
            text += &format!("/*{:04x}*/ {code} ;\n", index * 16);
        }
        Flow::of(&parse(&text).unwrap_or_else(|error| panic!("{error}"))[0])
    }

    #[test]
    fn a_diamond() {
        let flow = flow(&[
            "@P0 BRA `(.then)",
            "MOV R1, 0x1",
            "BRA `(.join)",
            ".then: MOV R1, 0x2",
            ".join: EXIT",
            ".end: BRA `(.end)",
        ]);
        assert_eq!(flow.blocks, [0..1, 1..3, 3..4, 4..5, 5..6]);
        assert_eq!(flow.successors, [vec![1, 2], vec![3], vec![3], vec![], vec![4]]);
        assert_eq!(flow.post_dominators()[..3], [Some(3), Some(3), Some(3)]);
        assert_eq!(flow.live(), [true, true, true, true, false]);
    }

    #[test]
    fn a_call_returns_behind_itself() {
        let flow = flow(&["MOV R2, 0x20", "CALL.REL.NOINC `(.f)", "EXIT", ".f: NOP", "RET.REL.NODEC R2 `(k)"]);
        let back = flow.block_of[2];
        assert!(flow.successors[flow.block_of[4]] == [back] && flow.live().iter().all(|&live| live));
    }
}
