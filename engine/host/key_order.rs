//! The order of names in tables that were JSON objects. Lua keeps none, but a chat template writes tools and arguments of
//! calls as they come, and a model has learned them in the order of their file. It hides in a metatable of the table.

use mlua::{Lua, Table};
use std::collections::HashMap;

/// The field of the metatable with the names in order.
const FIELD: &str = "__key_order";
/// In Lua's registry: metatables by their names, which tables of one order share, as long as one of them lives.
const KNOWN: &str = "perilune.key_orders";

/// How names of tables that never were JSON are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unordered {
    Sorted,
    /// As descriptions of tools are written everywhere, the rest sorted behind.
    Tools,
}

const TOOL_NAMES: [&str; 7] = ["type", "function", "name", "description", "parameters", "properties", "required"];

/// Keeps the order of `names` with `table`, unless it is the sorted one.
///
/// Errors: those of Lua.
pub fn remember<'a>(lua: &Lua, table: &Table, names: impl Iterator<Item = &'a str> + Clone) -> mlua::Result<()> {
    if names.clone().is_sorted() {
        return Ok(());
    }
    let known: Table = match lua.named_registry_value(KNOWN)? {
        Some(known) => known,
        None => {
            let (known, weak) = (lua.create_table()?, lua.create_table()?);
            weak.raw_set("__mode", "v")?;
            known.set_metatable(Some(weak))?;
            lua.set_named_registry_value(KNOWN, &known)?;
            known
        }
    };
    let key = serde_json::Value::from(names.clone().collect::<Vec<_>>()).to_string();
    let order: Table = match known.raw_get(key.as_str())? {
        Some(order) => order,
        None => {
            let order = lua.create_table()?;
            order.raw_set(FIELD, lua.create_sequence_from(names)?)?;
            known.raw_set(key, &order)?;
            order
        }
    };
    table.set_metatable(Some(order)).map(|_| ())
}

/// Puts `entries` of `table` in their order: names that the table was made with as they were, others sorted behind them.
pub fn sort<T>(table: &Table, entries: &mut [(String, T)], unordered: Unordered) {
    let known = table.metatable().and_then(|order| order.raw_get::<Option<Vec<String>>>(FIELD).ok().flatten());
    let order: HashMap<&str, usize> = match (&known, unordered) {
        (Some(known), _) => known.iter().map(String::as_str).zip(0..).collect(),
        (None, Unordered::Tools) => TOOL_NAMES.into_iter().zip(0..).collect(),
        (None, Unordered::Sorted) => HashMap::new(),
    };
    entries.sort_by_cached_key(|(name, _)| (order.get(name.as_str()).copied().unwrap_or(usize::MAX), name.clone()));
}

#[cfg(test)]
mod tests {
    use super::super::args::json_to_lua;
    use super::super::conversations::plain_json;
    use super::super::plain::Plain;
    use super::*;
    use mlua::Value;

    #[test]
    fn what_was_json_keeps_its_order_through_lua_and_through_the_store() {
        let lua = Lua::new();
        let text = r#"{"z":[{"type":"f","name":"n","$x":1}],"a":{"b":1,"c":{"y":null,"d":2,"c":3}}}"#;
        let want = text.replace(r#""y":null,"#, "");
        let read = |text: &str| json_to_lua(&lua, &serde_json::from_str(text).unwrap()).unwrap();
        let record = read(text);
        assert_eq!(plain_json(&record).unwrap().to_string(), want);
        let plain = Plain::of("test", "value", &record).unwrap();
        assert_eq!(plain_json(&plain.to_lua(&lua).unwrap()).unwrap().to_string(), want);
        // As the key of a step it is what a script's own table would be.
        lua.globals().set("record", &record).unwrap();
        let own: Value =
            lua.load("return { a = { b = 1, c = { c = 3, d = 2 } }, z = { { ['$x'] = 1, name = 'n', type = 'f' } } }").eval().unwrap();
        assert_eq!(Plain::of("test", "value", &own).unwrap().canonical(), plain.canonical());
        // Names that come later stand behind, those that go leave no gap.
        lua.load("record.k, record.b, record.z = 1, 2, nil").exec().unwrap();
        assert_eq!(plain_json(&record).unwrap().to_string(), r#"{"a":{"b":1,"c":{"d":2,"c":3}},"b":2,"k":1}"#);
        // One metatable for all tables of an order, and none for the sorted one.
        let metatable = |value: Value| value.as_table().unwrap().metatable();
        assert_eq!(metatable(read(r#"{"b":1,"a":2}"#)), metatable(read(r#"{"b":3,"a":4}"#)));
        assert_eq!(metatable(read(r#"{"a":1,"b":2}"#)), None);
    }
}
