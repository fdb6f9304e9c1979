//! The content of a session: five keys, in the requested size.

use std::collections::HashMap;

use serde_json::{Value, json};

pub(crate) type Data = HashMap<String, Value>;

/// The data of all sessions except the owner, made once.
pub(crate) struct Content {
    data: Data,
}

impl Content {
    /// `size` is the size of the data as JSON, up to the owner's digits.
    pub(crate) fn new(size: usize) -> Self {
        let mut data: Data = [
            ("owner".to_owned(), json!(0)),
            ("version".to_owned(), json!(0)),
            ("theme".to_owned(), json!("dark")),
            ("seen".to_owned(), json!(["terms", "newsletter"])),
        ]
        .into();
        let so_far = json!(data).to_string().len() + r#","cart":[]"#.len();
        data.insert("cart".to_owned(), cart(size.saturating_sub(so_far)));
        Self { data }
    }

    pub(crate) fn of(&self, owner: u64) -> Data {
        let mut data = self.data.clone();
        data.insert("owner".to_owned(), json!(owner));
        data
    }
}

/// A list of texts that is about `bytes` long as JSON.
fn cart(mut bytes: usize) -> Value {
    const ITEM: usize = 36;
    const QUOTES_AND_COMMA: usize = 3;

    let mut items = Vec::new();
    while bytes > QUOTES_AND_COMMA {
        let length = if bytes < 2 * ITEM { bytes } else { ITEM } - QUOTES_AND_COMMA;
        items.push(Value::from("x".repeat(length)));
        bytes -= length + QUOTES_AND_COMMA;
    }
    Value::from(items)
}
