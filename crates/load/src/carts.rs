//! What is bought. Pure: products come from the options, carts from products and a seed.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use fastrand::Rng;

use crate::options::Options;

/// Different carts of several products that are prepared, unless there are so many products that more are needed.
const CARTS: usize = 4096;
/// Products at most that are sold out, or that cost too much.
const SPECIAL_PRODUCTS: u32 = 10;
/// Products cost from 1 to this.
const PRICES: u64 = 100;

/// A product that the run creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Product {
    /// The number that the shop gave it; 0 before it did.
    pub(crate) id: u64,
    pub(crate) price: u64,
    pub(crate) stock: u64,
}

/// The products of a run, in three kinds, one behind the other: ordinary, sold out, too dear.
#[derive(Clone, Debug)]
pub(crate) struct Products {
    all: Vec<Product>,
    ordinary: usize,
    sold_out: usize,
}

impl Products {
    /// What has to be created.
    pub(crate) fn planned(options: &Options) -> Products {
        let special = |share: f64| if share > 0.0 { options.products.min(SPECIAL_PRODUCTS) } else { 0 };
        let (sold_out, dear) = (special(options.out_of_stock), special(options.declined));
        let ordinary = (0..options.products).map(|number| Product {
            id: 0,
            price: 1 + u64::from(number) % PRICES,
            stock: options.stock,
        });
        let sold_out_ones = (0..sold_out).map(|_| Product { id: 0, price: 1, stock: 0 });
        let dear_ones =
            (0..dear).map(|_| Product { id: 0, price: options.declined_price, stock: options.stock });
        Products {
            all: ordinary.chain(sold_out_ones).chain(dear_ones).collect(),
            ordinary: options.products as usize,
            sold_out: sold_out as usize,
        }
    }

    /// All of them, in the order of the lines of carts.
    pub(crate) fn all(&self) -> &[Product] {
        &self.all
    }

    /// All of them, to be given their numbers.
    pub(crate) fn all_mut(&mut self) -> &mut [Product] {
        &mut self.all
    }
}

/// A cart: places of products, each once.
#[derive(Clone, Debug)]
pub(crate) struct Cart {
    pub(crate) products: Box<[u32]>,
    /// The body of its request.
    pub(crate) body: Bytes,
    /// What it costs.
    pub(crate) total: u128,
}

/// The carts of a run, and how often each kind is drawn.
#[derive(Clone, Debug)]
pub(crate) struct Carts {
    all: Vec<Cart>,
    ordinary: Range<usize>,
    sold_out: Range<usize>,
    dear: Range<usize>,
    out_of_stock_share: f64,
    declined_share: f64,
    amount: u32,
}

impl Carts {
    /// Puts together what can be bought of products that exist.
    pub(crate) fn new(options: &Options, products: &Products) -> Carts {
        let mut dice = Rng::with_seed(options.seed);
        let size = options.cart_size as usize;
        let count = if size == 1 { products.ordinary } else { CARTS.max(products.ordinary / size) };
        let specials = products.all.len() - products.ordinary;
        let mut all = Vec::with_capacity(count + specials);
        let cart = |places: Vec<u32>| cart(places, &products.all, options.amount);
        for number in 0..count {
            all.push(cart(if size == 1 {
                vec![number as u32]
            } else {
                draw_places(&mut dice, size, products.ordinary)
            }));
        }
        for special in products.ordinary..products.all.len() {
            let mut places = draw_places(&mut dice, size - 1, products.ordinary);
            places.push(special as u32);
            all.push(cart(places));
        }
        let sold_out = count..count + products.sold_out;
        Carts {
            ordinary: 0..count,
            dear: sold_out.end..all.len(),
            sold_out,
            all,
            out_of_stock_share: options.out_of_stock,
            declined_share: options.declined,
            amount: options.amount,
        }
    }

    /// The next cart: its place among all.
    pub(crate) fn draw(&self, dice: &mut Rng) -> u32 {
        let kind = if self.sold_out.is_empty() && self.dear.is_empty() { 1.0 } else { dice.f64() };
        let kind = if kind < self.out_of_stock_share {
            &self.sold_out
        } else if kind < self.out_of_stock_share + self.declined_share {
            &self.dear
        } else {
            &self.ordinary
        };
        dice.usize(kind.clone()) as u32
    }

    /// All of them.
    pub(crate) fn all(&self) -> &[Cart] {
        &self.all
    }

    /// How many of each of its products are in a cart.
    pub(crate) fn amount(&self) -> u32 {
        self.amount
    }
}

fn cart(places: Vec<u32>, products: &[Product], amount: u32) -> Cart {
    let lines: Vec<String> = places
        .iter()
        .map(|place| format!(r#"{{"product_id":{},"amount":{amount}}}"#, products[*place as usize].id))
        .collect();
    let body = format!(r#"{{"purchase_items":[{}],"payment":{{"currency_code":"NT"}}}}"#, lines.join(","));
    let price = |place: &u32| u128::from(products[*place as usize].price) * u128::from(amount);
    let total = places.iter().map(price).sum();
    Cart { products: places.into(), body: body.into(), total }
}

/// Different places below `end` (Robert Floyd's sampling: as many throws as places). `count` is at most `end`.
fn draw_places(dice: &mut Rng, count: usize, end: usize) -> Vec<u32> {
    let mut drawn = BTreeSet::new();
    for last in end - count..end {
        let place = dice.usize(0..=last) as u32;
        if !drawn.insert(place) {
            drawn.insert(last as u32);
        }
    }
    drawn.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn plan(line: &str) -> (Products, Carts) {
        let options = Line::parse_from(["load"].into_iter().chain(line.split_whitespace())).options;
        let mut products = Products::planned(&options);
        products.all_mut().iter_mut().zip(1000..).for_each(|(product, id)| product.id = id);
        let carts = Carts::new(&options, &products);
        (products, carts)
    }

    #[test]
    fn a_cart_is_a_request() {
        let (products, carts) = plan("--products 3 --amount 2");
        assert_eq!(carts.all().len(), 3);
        let expected =
            r#"{"purchase_items":[{"product_id":1002,"amount":2}],"payment":{"currency_code":"NT"}}"#;
        assert_eq!(carts.all()[2].body, expected);
        assert_eq!(carts.all()[2].total, 2 * u128::from(products.all()[2].price));
    }

    #[test]
    fn the_products_of_a_cart_differ() {
        for line in ["--products 5 --cart-size 5", "--products 50 --cart-size 7 --declined 0.5"] {
            let (_, carts) = plan(line);
            for cart in carts.all() {
                let distinct: BTreeSet<&u32> = cart.products.iter().collect();
                assert_eq!(distinct.len(), cart.products.len(), "{line}");
                assert_eq!(distinct.len(), if line.contains('7') { 7 } else { 5 }, "{line}");
            }
        }
    }

    #[test]
    fn shares_are_kept_and_a_seed_repeats() {
        let (products, carts) = plan("--products 20 --cart-size 3 --out-of-stock 0.2 --declined 0.1");
        let draw = |seed| {
            let mut dice = Rng::with_seed(seed);
            (0..10_000).map(|_| carts.draw(&mut dice)).collect::<Vec<_>>()
        };
        let drawn = draw(7);
        let with = |test: &dyn Fn(&Product) -> bool| {
            let has = |cart: &&u32| {
                carts.all()[**cart as usize]
                    .products
                    .iter()
                    .any(|place| test(&products.all()[*place as usize]))
            };
            drawn.iter().filter(has).count()
        };
        assert!((1_800..2_200).contains(&with(&|product| product.stock == 0)));
        assert!((850..1_150).contains(&with(&|product| product.price == 1_000_001)));
        assert_eq!(drawn, draw(7));
        assert_ne!(drawn, draw(8));
    }

    #[test]
    fn every_product_is_bought() {
        let (_, carts) = plan("--products 10");
        let mut dice = Rng::with_seed(1);
        let drawn: BTreeSet<u32> = (0..1_000).map(|_| carts.draw(&mut dice)).collect();
        assert_eq!(drawn.len(), 10);
    }
}
