//! The load-balancing loss of a mixture of experts: counts and sums that the caller pools over layers, micro-batches or
//! the whole batch before it multiplies them. The coefficient is the caller's.
//! Source: transformers' Qwen2-MoE loss, which sums over the k slots: perfect balance gives k, not 1.

/// What the loss needs to know of some rows of routing; two of them add up.
#[derive(Clone, Debug, PartialEq)]
pub struct Balance {
    /// Rows counted.
    pub rows: u64,
    /// `[k, experts]`: rows whose choice in slot `s` is expert `e`.
    pub counts: Vec<u64>,
    /// `[experts]`: sums over the rows of each expert's probability.
    pub prob_sums: Vec<f64>,
}

impl Balance {
    /// No rows yet.
    pub fn new(experts: usize, k: usize) -> Self {
        Self { rows: 0, counts: vec![0; k * experts], prob_sums: vec![0.0; experts] }
    }

    /// Counts the rows of one layer, in order.
    ///
    /// - `probs`: `[tokens, experts]`, `chosen`: `[tokens, k]`, from [`super::route::route`]
    /// - `mask`: `[tokens]`, false leaves the row out (padding)
    pub fn count(&mut self, probs: &[f32], chosen: &[u32], mask: Option<&[bool]>) {
        let experts = self.prob_sums.len();
        let k = self.counts.len() / experts;
        let tokens = probs.len() / experts;
        assert!(probs.len() == tokens * experts, "load balance: {} probabilities of {experts} experts", probs.len());
        assert!(chosen.len() == tokens * k, "load balance: {} choices for {tokens} tokens of {k}", chosen.len());
        assert!(mask.is_none_or(|mask| mask.len() == tokens), "load balance: the mask does not have {tokens} rows");
        for (token, (probs, chosen)) in probs.chunks_exact(experts).zip(chosen.chunks_exact(k)).enumerate() {
            if mask.is_none_or(|mask| mask[token]) {
                self.rows += 1;
                self.prob_sums.iter_mut().zip(probs).for_each(|(sum, prob)| *sum += f64::from(*prob));
                chosen.iter().enumerate().for_each(|(slot, expert)| self.counts[slot * experts + *expert as usize] += 1);
            }
        }
    }

    /// Adds another's rows.
    pub fn add(&mut self, other: &Self) {
        assert!(self.counts.len() == other.counts.len(), "load balance: {} counts and {}", self.counts.len(), other.counts.len());
        assert!(self.prob_sums.len() == other.prob_sums.len(), "load balance: two numbers of experts");
        self.rows += other.rows;
        self.counts.iter_mut().zip(&other.counts).for_each(|(own, more)| *own += more);
        self.prob_sums.iter_mut().zip(&other.prob_sums).for_each(|(own, more)| *own += more);
    }

    /// Rows that chose each expert in any slot: `[experts]`.
    pub fn visits(&self) -> Vec<u64> {
        let experts = self.prob_sums.len();
        (0..experts).map(|expert| self.counts.iter().skip(expert).step_by(experts).sum()).collect()
    }

    /// `experts * sum over slots and experts of f[s, e] * P[e]`, with `f` and `P` the means over the rows; 0 for no rows.
    pub fn loss(&self) -> f64 {
        let rows = self.rows.max(1) as f64;
        let dot: f64 = self.visits().iter().zip(&self.prob_sums).map(|(visits, sum)| *visits as f64 / rows * (sum / rows)).sum();
        self.prob_sums.len() as f64 * dot
    }

    /// Adds the gradient of `by * loss` to the gradient of the probabilities of one layer's rows. Choices have none.
    ///
    /// - `mask`: as in [`Balance::count`]
    /// - `d_probs`: `[tokens, experts]`, added to
    pub fn add_gradient(&self, by: f64, mask: Option<&[bool]>, d_probs: &mut [f32]) {
        let experts = self.prob_sums.len();
        assert!(d_probs.len().is_multiple_of(experts), "load balance: {} gradients of {experts} experts", d_probs.len());
        assert!(mask.is_none_or(|mask| mask.len() == d_probs.len() / experts), "load balance: the mask has another number of rows");
        let rows = self.rows.max(1) as f64;
        let row: Vec<f32> = self.visits().iter().map(|visits| (by * experts as f64 * *visits as f64 / (rows * rows)) as f32).collect();
        for (token, d_probs) in d_probs.chunks_exact_mut(experts).enumerate() {
            if mask.is_none_or(|mask| mask[token]) {
                d_probs.iter_mut().zip(&row).for_each(|(d, own)| *d += own);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::route::route;
    use super::super::samples::uniform;
    use super::*;

    #[test]
    fn perfect_balance_gives_k_and_one_busy_expert_gives_more() {
        // Four tokens choose (0,1), (1,2), (2,3), (3,0) with equal probabilities.
        let mut even = Balance::new(4, 2);
        even.count(&[0.25; 16], &[0, 1, 1, 2, 2, 3, 3, 0], None);
        assert!((even.loss() - 2.0).abs() < 1e-12);
        // All choose expert 0 then 1 with probabilities 0.7 and 0.3: 4 * (0.7 + 0.3); experts 2 and 3 have no token.
        let mut busy = Balance::new(4, 2);
        busy.count(&[0.7, 0.3, 0.0, 0.0].repeat(3), &[0, 1].repeat(3), None);
        assert!((busy.loss() - 4.0).abs() < 1e-6);
        assert_eq!(busy.visits(), [3, 3, 0, 0]);
        assert_eq!(Balance::new(4, 2).loss(), 0.0);
    }

    #[test]
    fn layers_pool_and_masked_rows_do_not_count() {
        let (tokens, experts, k) = (7, 6, 2);
        let (mut probs, mut chosen, mut weights) = (vec![0.0; tokens * experts], vec![0; tokens * k], vec![0.0; tokens * k]);
        route(&uniform(1, tokens * experts), experts, k, false, &mut probs, &mut chosen, &mut weights);
        let mask = [true, false, true, true, false, true, true];
        let mut whole = Balance::new(experts, k);
        whole.count(&probs, &chosen, Some(&mask));
        assert_eq!(whole.rows, 5);
        let (mut first, mut second) = (Balance::new(experts, k), Balance::new(experts, k));
        first.count(&probs[..3 * experts], &chosen[..3 * k], Some(&mask[..3]));
        second.count(&probs[3 * experts..], &chosen[3 * k..], Some(&mask[3..]));
        first.add(&second);
        assert!((first.loss() - whole.loss()).abs() < 1e-12);
        assert_eq!(first.counts, whole.counts);

        // The loss is linear in the probabilities, so one step of any size gives the slope.
        let mut d_probs = vec![1.0f32; probs.len()];
        whole.add_gradient(0.5, Some(&mask), &mut d_probs);
        for index in 0..probs.len() {
            let mut moved = probs.clone();
            moved[index] += 0.125;
            let mut other = Balance::new(experts, k);
            other.count(&moved, &chosen, Some(&mask));
            let slope = 0.5 * (other.loss() - whole.loss()) / 0.125;
            assert!((f64::from(d_probs[index]) - 1.0 - slope).abs() < 1e-6, "{index}"); // f32 near 1.
        }
    }
}
