//! The columns of the fused query-key-value activation: all query heads, then all key heads, then all value heads.
//! Knows no tokens and no documents.

use crate::error::{Error, Result};

/// How many query heads share how many key and value heads, and how wide each is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    /// Even, at most [`Heads::HEAD_DIM_MAX`].
    pub head_dim: usize,
}

impl Heads {
    pub const HEAD_DIM_MAX: usize = 256;

    /// Errors: [`Error::Argument`] if `heads` is not a multiple of `kv_heads`, if one is 0, or if `head_dim` is odd,
    /// 0 or above 256.
    pub fn check(&self, op: &'static str) -> Result<()> {
        let Self { heads, kv_heads, head_dim } = *self;
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(Error::argument(op, "heads", "a positive multiple of kv_heads", format!("{heads} heads, {kv_heads} kv_heads")));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > Self::HEAD_DIM_MAX {
            return Err(Error::argument(op, "head_dim", "an even number from 2 to 256", head_dim));
        }
        Ok(())
    }

    /// Query heads that share one key and value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// What scores are multiplied by: one over the root of the head's width.
    pub fn scale(&self) -> f32 {
        (self.head_dim as f32).sqrt().recip()
    }

    /// Columns of the fused activation: `(heads + 2 * kv_heads) * head_dim`.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// First column of query head `head`.
    pub fn query(&self, head: usize) -> usize {
        head * self.head_dim
    }

    /// First column of key head `kv_head`.
    pub fn key(&self, kv_head: usize) -> usize {
        (self.heads + kv_head) * self.head_dim
    }

    /// First column of value head `kv_head`.
    pub fn value(&self, kv_head: usize) -> usize {
        (self.heads + self.kv_heads + kv_head) * self.head_dim
    }

    /// Rows of `values` elements in a fused activation.
    ///
    /// Errors: [`Error::Shape`] if they are not whole rows.
    pub fn tokens(&self, op: &'static str, arg: &'static str, values: usize) -> Result<usize> {
        let width = self.width();
        if !values.is_multiple_of(width) {
            return Err(Error::Shape { op, arg, expected: format!("[tokens, {width}]"), got: format!("{values} values") });
        }
        Ok(values / width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_follow_each_other_and_odd_shapes_are_refused() {
        let heads = Heads { heads: 14, kv_heads: 2, head_dim: 64 };
        heads.check("test").unwrap();
        assert_eq!((heads.group(), heads.width()), (7, 18 * 64));
        assert_eq!((heads.query(13), heads.key(0), heads.key(1), heads.value(0), heads.value(1)), (832, 896, 960, 1024, 1088));
        assert_eq!(heads.tokens("test", "qkv", 5 * 18 * 64).unwrap(), 5);
        assert!(heads.tokens("test", "qkv", 5).is_err());
        for (h, k, d) in [(3, 2, 4), (0, 1, 4), (2, 0, 4), (2, 1, 0), (2, 1, 7), (2, 1, 258)] {
            assert!(Heads { heads: h, kv_heads: k, head_dim: d }.check("test").is_err(), "{h} {k} {d}");
        }
    }
}
