//! Which text has which blocks of cached keys and values: tables, shared beginnings, and what is free. The blocks' memory
//! and layout are tensor/paged_attention.rs's, on the CPU and on a GPU.

use crate::error::Result;
use crate::model::Model;
use crate::model::paged::{BLOCK_POSITIONS, Cache};

/// The blocks of one text and how many of its positions are cached.
#[derive(Debug, Default)]
pub struct Table {
    blocks: Vec<u32>,
    len: usize,
}

impl Table {
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Cached positions.
    pub fn cached(&self) -> usize {
        self.len
    }
}

/// Blocks for `positions` of one text.
pub fn blocks_for(positions: usize) -> usize {
    positions.div_ceil(BLOCK_POSITIONS)
}

/// All blocks of a model's cache, by how many tables name each.
pub struct KvCache {
    memory: Cache,
    names: Vec<u32>,
    free: Vec<u32>,
    block_bytes: usize,
}

impl KvCache {
    /// Errors: those of the device.
    pub fn new(model: &Model) -> Result<Self> {
        let memory = model.cache()?;
        let block_bytes = memory.lock().expect("a new lock").block_bytes();
        Ok(Self { memory, names: Vec::new(), free: Vec::new(), block_bytes })
    }

    /// Bytes that are free for blocks where the model lies, if the system says it.
    pub fn bytes_free(&self) -> Option<u64> {
        self.lock().bytes_free()
    }

    pub fn memory(&self) -> &Cache {
        &self.memory
    }

    /// Bytes of one block, all layers together.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Blocks that some table names.
    pub fn used(&self) -> usize {
        self.names.len() - self.free.len()
    }

    /// Counts `count` more positions as cached, with blocks for them.
    ///
    /// Errors: [`crate::error::Error::Device`] if the device has no room.
    pub fn extend(&mut self, table: &mut Table, count: usize) -> Result<()> {
        table.len += count;
        while table.blocks.len() < blocks_for(table.len) {
            let id = self.take();
            self.lock().make(id)?;
            table.blocks.push(id);
        }
        Ok(())
    }

    /// Another table over the same positions: whole blocks are shared, and the last one, which both will write into, copied.
    ///
    /// Errors: as [`KvCache::extend`].
    pub fn fork(&mut self, table: &Table) -> Result<Table> {
        let mut fork = Table { blocks: table.blocks.clone(), len: table.len };
        let whole = table.len / BLOCK_POSITIONS;
        for id in &fork.blocks[..whole] {
            self.names[*id as usize] += 1;
        }
        if let Some(last) = fork.blocks.get_mut(whole) {
            let id = self.take();
            self.lock().copy(*last, id)?;
            *last = id;
        }
        Ok(fork)
    }

    /// Forgets a text; blocks that no other one names are free.
    pub fn release(&mut self, table: Table) {
        for id in table.blocks {
            let names = &mut self.names[id as usize];
            *names -= 1;
            if *names == 0 {
                self.lock().drop_block(id);
                self.free.push(id);
            }
        }
    }

    fn take(&mut self) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            self.names.push(0);
            u32::try_from(self.names.len() - 1).expect("memory ends before ids do")
        });
        self.names[id as usize] = 1;
        id
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, crate::tensor::paged_attention::KvBlocks> {
        self.memory.lock().expect("attention does not panic under this lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::element::Dtype;
    use crate::model::presets::preset;

    #[test]
    fn forks_share_whole_blocks_and_copy_the_last() {
        let model = Model::random(preset("tiny").unwrap(), Dtype::F32, 1).unwrap();
        let mut cache = KvCache::new(&model).unwrap();
        let mut table = Table::default();
        cache.extend(&mut table, 2 * BLOCK_POSITIONS + 1).unwrap();
        let mut fork = cache.fork(&table).unwrap();
        assert_eq!((cache.used(), table.blocks()), (4, &[0, 1, 2][..]));
        assert_eq!(fork.blocks(), [0, 1, 3]);
        cache.extend(&mut fork, BLOCK_POSITIONS).unwrap();
        assert_eq!((cache.used(), fork.cached()), (5, 3 * BLOCK_POSITIONS + 1));
        let even = cache.fork(&Table { blocks: vec![0, 1], len: 2 * BLOCK_POSITIONS }).unwrap();
        assert_eq!((cache.used(), even.blocks()), (5, &[0, 1][..]));
        cache.release(even);
        cache.release(table);
        assert_eq!(cache.used(), 4, "the fork still names blocks 0 and 1");
        cache.release(fork);
        assert_eq!(cache.used(), 0);
        let mut again = Table::default();
        cache.extend(&mut again, 1).unwrap();
        assert_eq!((cache.used(), again.blocks().len()), (1, 1));
    }
}
