//! The pieces of Python that chat templates lean on: `json.dumps`, string and table methods, `strftime`.
//! Not a template engine: `chat_template.rs` hands these to minijinja. Source: CPython 3's documented behaviour of each.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use serde_json::Value as Json;

fn refuse(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// The `tojson` filter of transformers: `json.dumps(value, ensure_ascii=False)`, with `indent` where given. Unlike Jinja's own
/// it escapes no HTML, and keys keep their order.
pub fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if value.is_undefined() {
        return Err(refuse("tojson: the value is undefined"));
    }
    let mut json = serde_json::to_value(value).map_err(|error| refuse(format!("tojson: {error}")))?;
    if sort == Some(true) {
        json.sort_all_objects();
    }
    let mut text = String::new();
    dumps(&json, indent, 0, &mut text);
    if ascii == Some(true) {
        text = text.chars().flat_map(ascii_escape).collect();
    }
    Ok(Value::from(text))
}

/// Appends `json.dumps(value, ensure_ascii=False, indent=indent)` to `out`; `depth` is the nesting so far.
pub fn dumps(value: &Json, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value {
        Json::Array(items) if !items.is_empty() => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { separator } else { "" });
                line(depth + 1, out);
                dumps(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        Json::Object(entries) if !entries.is_empty() => {
            out.push('{');
            for (index, (key, item)) in entries.iter().enumerate() {
                out.push_str(if index > 0 { separator } else { "" });
                line(depth + 1, out);
                out.push_str(&Json::from(key.as_str()).to_string());
                out.push_str(": ");
                dumps(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        Json::Number(number) if number.is_f64() => out.push_str(&float_repr(number.as_f64().unwrap_or(f64::NAN))),
        // Strings, integers, true, false, null and empty containers are written alike by both.
        other => out.push_str(&other.to_string()),
    }
}

/// Python's `repr` of a float: the shortest digits that read back, an exponent below 1e-4 and from 1e16 on.
fn float_repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let text = value.to_string();
    if text.contains('.') { text } else { text + ".0" }
}

fn ascii_escape(character: char) -> Vec<char> {
    if character.is_ascii() {
        return vec![character];
    }
    let mut units = [0; 2];
    character.encode_utf16(&mut units).iter().flat_map(|unit| format!("\\u{unit:04x}").chars().collect::<Vec<_>>()).collect()
}

/// The methods of Python's strings and tables that chat templates call.
pub fn method(_state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("{} has no method named {name}", value.kind()));
    match (value.kind(), value.as_str()) {
        (ValueKind::String, Some(text)) => string_method(text, name, args)?.ok_or_else(unknown),
        (ValueKind::Map, _) => {
            let keys: Vec<Value> = value.try_iter()?.collect();
            let item = |key: &Value| value.get_item(key);
            match name {
                "keys" => Ok(Value::from(keys)),
                "values" => Ok(Value::from(keys.iter().map(item).collect::<Result<Vec<_>, _>>()?)),
                "items" => {
                    let pairs: Result<Vec<_>, _> = keys.iter().map(|key| Ok(Value::from(vec![key.clone(), item(key)?]))).collect();
                    pairs.map(Value::from)
                }
                "get" => {
                    let key = args.first().ok_or_else(|| refuse("get: a key is missing"))?;
                    let found = item(key)?;
                    let default = || args.get(1).cloned().unwrap_or_else(|| Value::from(()));
                    Ok(if found.is_undefined() { default() } else { found })
                }
                _ => Err(unknown()),
            }
        }
        _ => Err(unknown()),
    }
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let argument = |index: usize| -> Result<Option<&str>, Error> {
        match args.get(index) {
            None => Ok(None),
            Some(value) if value.is_none() => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| refuse(format!("{name}: expected a string, got {}", value.kind()))),
        }
    };
    let needed = |index: usize| argument(index)?.ok_or_else(|| refuse(format!("{name}: argument {} is missing", index + 1)));
    let limit = || args.get(1).and_then(Value::as_i64).and_then(|limit| usize::try_from(limit).ok());
    let strip = |left: bool, right: bool| -> Result<Value, Error> {
        let chars = argument(0)?;
        let drop = |c: char| chars.map_or(c.is_whitespace(), |chars| chars.contains(c));
        let text = if left { text.trim_start_matches(drop) } else { text };
        Ok(Value::from(if right { text.trim_end_matches(drop) } else { text }))
    };
    let any = |test: &dyn Fn(&str) -> bool| -> Result<Value, Error> {
        // `startswith` and `endswith` take one string or several.
        match args.first() {
            Some(value) if value.kind() == ValueKind::Seq => Ok(Value::from(value.try_iter()?.any(|item| item.as_str().is_some_and(test)))),
            _ => Ok(Value::from(test(needed(0)?))),
        }
    };
    let list = |parts: Vec<&str>| Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>());
    Ok(Some(match name {
        "strip" => strip(true, true)?,
        "lstrip" => strip(true, false)?,
        "rstrip" => strip(false, true)?,
        "startswith" => any(&|prefix| text.starts_with(prefix))?,
        "endswith" => any(&|suffix| text.ends_with(suffix))?,
        "upper" => Value::from(text.to_uppercase()),
        "lower" => Value::from(text.to_lowercase()),
        "capitalize" => {
            let mut chars = text.chars();
            let first: String = chars.next().map(|first| first.to_uppercase().collect()).unwrap_or_default();
            Value::from(first + &chars.as_str().to_lowercase())
        }
        "title" => {
            let mut inside = false;
            let change = |c: char| -> Vec<char> {
                let word = std::mem::replace(&mut inside, c.is_alphabetic());
                if word { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(text.chars().flat_map(change).collect::<String>())
        }
        "replace" => match args.get(2).and_then(Value::as_usize) {
            Some(count) => Value::from(text.replacen(needed(0)?, needed(1)?, count)),
            None => Value::from(text.replace(needed(0)?, needed(1)?)),
        },
        "find" => Value::from(text.find(needed(0)?).map_or(-1, |at| text[..at].chars().count() as i64)),
        "count" => Value::from(text.matches(needed(0)?).count()),
        "isdigit" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        "splitlines" => list(text.lines().collect()),
        "split" | "rsplit" => match argument(0)? {
            Some("") => return Err(refuse("split: empty separator")),
            Some(separator) => match (limit(), name) {
                (None, _) => list(text.split(separator).collect()),
                (Some(limit), "split") => list(text.splitn(limit + 1, separator).collect()),
                (Some(limit), _) => {
                    let mut parts: Vec<_> = text.rsplitn(limit + 1, separator).collect();
                    parts.reverse();
                    list(parts)
                }
            },
            None if limit().is_none() => list(text.split_whitespace().collect()),
            None => return Err(refuse(format!("{name}: a limit needs a separator"))),
        },
        _ => return Ok(None),
    }))
}

/// `strftime` of a time in UTC for the directives that chat templates use.
pub fn strftime(format: &str, unix_s: i64) -> Result<String, Error> {
    const MONTHS: [&str; 12] =
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[days.rem_euclid(7) as usize];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year.rem_euclid(100)),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", second / 3_600),
            Some('M') => out += &format!("{:02}", second / 60 % 60),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('%') => out.push('%'),
            other => return Err(refuse(format!("strftime_now: the directive %{} is not known", other.unwrap_or(' ')))),
        }
    }
    Ok(out)
}

/// Year, month and day of a day count from 1970-01-01, by walking whole 400-year cycles, then years and months.
fn civil(days: i64) -> (i64, i64, i64) {
    const CYCLE: i64 = 146_097;
    let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    // 1970 shifted by whole cycles, so that the rest is not negative.
    let (mut year, mut rest) = (1970 + 400 * days.div_euclid(CYCLE), days.rem_euclid(CYCLE));
    while rest >= 365 + i64::from(leap(year)) {
        rest -= 365 + i64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + i64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_written_as_python_writes_it() {
        // Each right side is what CPython 3.11's json.dumps(..., ensure_ascii=False) prints.
        let check = |input: &str, indent, expected: &str| {
            let mut out = String::new();
            dumps(&serde_json::from_str(input).unwrap(), indent, 0, &mut out);
            assert_eq!(out, expected);
        };
        check(r#"{"b":1,"a":[1,2.0,null,true],"e":{},"l":[]}"#, None, r#"{"b": 1, "a": [1, 2.0, null, true], "e": {}, "l": []}"#);
        check(r#""<é天\u0001\n\"\\/\u007f>""#, None, "\"<é天\\u0001\\n\\\"\\\\/\u{7f}>\"");
        check(
            "[1e-7,1e22,1e16,1e15,0.0001,0.00001,1.5,-0.0,0.1,123456789012345680.0]",
            None,
            "[1e-07, 1e+22, 1e+16, 1000000000000000.0, 0.0001, 1e-05, 1.5, -0.0, 0.1, 1.2345678901234568e+17]",
        );
        check(r#"{"a":[1],"b":{}}"#, Some(2), "{\n  \"a\": [\n    1\n  ],\n  \"b\": {}\n}");
    }

    #[test]
    fn dates_match_the_calendar() {
        // Checked with date -u -d @SECONDS.
        assert_eq!(strftime("%Y-%m-%d %H:%M:%S %A %b", 1_700_000_000).unwrap(), "2023-11-14 22:13:20 Tuesday Nov");
        assert_eq!(strftime("%d %B %y 100%%", 951_782_400).unwrap(), "29 February 00 100%");
        assert_eq!(strftime("%a %d.%m.%Y", -1).unwrap(), "Wed 31.12.1969");
        assert!(strftime("%Q", 0).is_err());
    }
}
