//! What the shop's services agree on: the purchase saga, its input and its subjects ([`purchase`]), and the questions
//! that they ask each other ([`calls`]). A service knows this and no other service.

pub mod calls;
pub mod purchase;
