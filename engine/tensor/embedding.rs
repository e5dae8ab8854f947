//! Token embedding with autograd: rows of a weight, with its low-rank part for lookups if it has one, and the sum of gradients
//! back into them in token order.

use super::ModelElement;
use super::cuda::embedding as cuda;
use super::embedding_part::LookedUp;
use super::parameter::{Layout, Parameter};
use super::typed::{Data, Tensor};
use crate::error::{Error, Result};
use crate::kernels::buffer::{Buffer, clear};
use crate::kernels::cpu::embedding::{Order, embed, embed_backward};
use std::sync::Arc;

/// The rows of `weight` that `tokens` name.
///
/// - `weight`: `[vocab, hidden]`, in rows or, when it is the head as well, in panels
/// - returns `[tokens, hidden]`
///
/// Errors: [`Error::Argument`] if a token is outside the vocabulary.
pub fn embedding<E: ModelElement>(tokens: &[i32], weight: &Arc<Parameter<E>>) -> Result<Tensor<E, 2>> {
    let (vocab, hidden) = (weight.rows(), weight.columns());
    if let Some((index, token)) = tokens.iter().enumerate().find(|(_, token)| usize::try_from(**token).map_or(true, |token| token >= vocab))
    {
        return Err(Error::argument(
            "embedding",
            format!("tokens[{index}]"),
            format!("an id from 0 to {}", vocab.saturating_sub(1)),
            token,
        ));
    }
    if let Some(device) = weight.place().device() {
        return cuda::embedding(device, tokens, weight);
    }
    let mut x = Buffer::<E>::scratch(tokens.len() * hidden);
    let order = if weight.layout() == Layout::Rows { Order::Rows } else { Order::Panels };
    if weight.layout() == Layout::Int8 {
        for (token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden.max(1))) {
            weight.read_weight_rows(*token as usize..*token as usize + 1, x)?;
        }
    } else {
        embed(&weight.read().weight, order, vocab, hidden, tokens, &mut x);
    }
    let (tokens, weight): (Arc<[i32]>, _) = (tokens.into(), weight.clone());
    let part = weight.embedding_part();
    let trains = weight.trains() || part.as_ref().is_some_and(|part| part.trains());
    let looked_up = part.map(|part| LookedUp::forward(part, tokens.clone(), &mut x));
    Ok(Tensor::from_operation([tokens.len(), hidden], Data::ready(x), &[], trains, move |dx, _| {
        looked_up.as_ref().map_or(Ok(()), |looked_up| looked_up.backward(&dx))?;
        weight.accumulate(|gradient, add| {
            if !add {
                clear(gradient);
            }
            embed_backward(&dx, &tokens, order, vocab, hidden, gradient);
        });
        Ok(())
    }))
}
