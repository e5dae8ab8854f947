//! Which Lua is built in.

/// The language version, as Lua itself says it: `Lua 5.4`.
pub fn lua_version() -> String {
    let answer = mlua::Lua::new().globals().get::<String>("_VERSION");
    answer.expect("every Lua defines _VERSION as a string")
}

#[cfg(test)]
mod tests {
    #[test]
    fn scripts_are_written_for_lua_5_4() {
        assert_eq!(super::lua_version(), "Lua 5.4");
    }
}
