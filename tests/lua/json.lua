--- std.json and std.schema: what is read, written, refused.
local json, schema, harness = require "std.json", require "std.schema", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect

describe("json", function()
  it("reads every kind of value", function()
    local value = json.decode ' {"a": [1, -2.5, 1e3, true, false, null], "b": {"c": "d"}, "": ""}\n'
    expect(value.a[1]).is(1)
    expect(math.type(value.a[1])).is "integer"
    expect(value.a[2]).is(-2.5)
    expect(value.a[3]).is(1000.0)
    expect(value.a[4] == true and value.a[5] == false and value.a[6] == json.null()).is(true)
    expect(value.b.c).is "d"
    expect(value[""]).is ""
    expect(json.decode "12").is(12)
    expect(json.decode "false").is(false)
    expect(math.type(json.decode "123456789012345678901")).is "float"
  end)
  it("reads escapes, pairs of surrogates and halves of them", function()
    expect(json.decode [["\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00"]]).is '"\\/\b\f\n\r\té😀'
    expect(json.decode [["\ud83d x"]]).is "\u{FFFD} x"
    expect(json.decode '"\127é"').is "\127é"
  end)
  it("says where it goes wrong", function()
    for _, case in ipairs {
      { "", "no value begins here" }, { "{", "a name in quotes" }, { "[1,]", "no value" }, { "[1 2]", "an array goes on" },
      { "{'a': 1}", "quotes" },
      { '{"a" 1}', "`:`" }, { '{"a": 1,}', "quotes" }, { '{"a": 1, "a": 2}', "twice" }, { "01", "no value" }, { "1.", "follows" },
      { "nul", "no value" },
      { '"a', "without an end" }, { '"\n"', "control" }, { '"\\x"', "escape" }, { '"\\u12"', "hexadecimal" }, { "1 2", "follows" },
      { '"\xff"', "UTF-8" },
      { ("["):rep(200), "brackets" }, { "NaN", "no value" }, { "\n\n[1,\n x]", "line 4, byte 8" }, { "-", "no value" },
    } do
      local value, message = json.decode(case[1])
      expect(value).is(nil)
      assert(message:find(case[2], 1, true), ("%q: %s"):format(case[1], message))
    end
  end)
  it("writes what it reads, sorted", function()
    local text = '{"a": [1, 2.5, "x\\n\\"\\\\\\u0001"], "b": {}, "c": [], "d": null, "e": true}'
    expect(json.encode(json.decode(text))).is(text)
    expect(json.encode { z = 1, a = json.array {} }).is '{"a": [], "z": 1}'
    expect(json.encode(nil)).is "null"
    expect(json.decode(json.encode(0.1))).is(0.1)
    expect(function() json.encode(0 / 0) end).fails "JSON has no nan"
    expect(function() json.encode { [1.5] = 1 } end).fails "names of an object"
    expect(function() json.encode(print) end).fails "function"
    local circle = {}
    circle.own = circle
    expect(function() json.encode(circle) end).fails "contains itself"
  end)
end)

describe("schema", function()
  local function fits(value, rules) return (schema.validate(value, rules)) end
  local function says(text, rules)
    local ok, message = schema.validate(json.decode(text), rules)
    return ok and "ok" or message
  end
  it("knows types", function()
    expect(fits(1, { type = "integer" }) and fits(1.0, { type = "integer" }) and fits(1, { type = "number" })).is(true)
    expect(fits(1.5, { type = "integer" })).is(false)
    expect(says("null", { type = { "string", "null" } })).is "ok"
    expect(says("[]", { type = "object" })).is "$ should be object, is array"
    expect(says("{}", { type = "array" })).is "$ should be array, is object"
    expect(says('"1"', { type = "number" })).is "$ should be number, is string"
  end)
  it("looks into objects and arrays", function()
    local rules = {
      type = "object", required = { "name", "tags" }, additionalProperties = false,
      properties = { name = { type = "string", minLength = 1, maxLength = 3, pattern = "^[a-z]+$" }, tags = { type = "array", items = { enum = { "x", "y" } }, minItems = 1, maxItems = 2 } },
    }
    expect(says('{"name": "ab", "tags": ["x"]}', rules)).is "ok"
    expect(says('{"tags": ["x"]}', rules)).is "$ has no name"
    expect(says('{"name": "ab", "tags": ["z"]}', rules)).is "$.tags[0] is none of the values that it may be"
    expect(says('{"name": "ab", "tags": []}', rules)).is "$.tags has fewer than 1 entries"
    expect(says('{"name": "ab", "tags": ["x"], "more": 1}', rules)).is "$ has more, which is not foreseen"
    expect(says('{"name": "aé", "tags": ["x"]}', rules)).is "$.name does not fit ^[a-z]+$"
    -- Characters, not bytes.
    expect(says('"äöü"', { maxLength = 3 })).is "ok"
    expect(says('{"a": "x"}', { additionalProperties = { type = "integer" } })).is "$.a should be integer, is string"
    expect(says('{"a": {"b": 1}}', { const = { a = { b = 1.0 } } })).is "ok"
  end)
  it("tries several schemas, and follows references", function()
    -- As pydantic writes a model with an optional and a nested field.
    local rules = json.decode [[{
      "$defs": { "Point": { "type": "object", "properties": { "x": { "type": "number", "multipleOf": 0.1 } }, "required": ["x"] },
                 "Tree": { "type": "object", "properties": { "children": { "type": "array", "items": { "$ref": "#/$defs/Tree" } } }, "additionalProperties": false } },
      "type": "object", "title": "Shape",
      "properties": { "at": { "$ref": "#/$defs/Point" }, "name": { "anyOf": [{ "type": "string", "format": "date" }, { "type": "null" }], "default": null },
                      "tree": { "$ref": "#/$defs/Tree" }, "tags": { "type": "array", "uniqueItems": true } } }]]
    expect(says('{"at": {"x": 0.3}, "name": null, "tags": [1, "1", [1]]}', rules)).is "ok"
    expect(says('{"at": {"x": 0.35}}', rules)).is "$.at.x is no multiple of 0.1"
    expect(says('{"at": {}}', rules)).is "$.at has no x"
    expect(says('{"name": 5}', rules)).is "$.name fits none of anyOf"
    expect(says('{"tags": [{"a": [1]}, 2, {"a": [1.0]}]}', rules)).is "$.tags has an entry twice"
    expect(says('{"tree": {"children": [{}, {"children": []}]}}', rules)).is "ok"
    expect(says('{"tree": {"children": [{}, {"kids": []}]}}', rules)).is "$.tree.children[1] has kids, which is not foreseen"
    local both = { oneOf = { { minimum = 3 }, { maximum = 5 } }, ["not"] = { const = 1 }, allOf = { { type = "integer" }, { maximum = 9 } } }
    expect(says("2", both)).is "ok"
    expect(says("4", both)).is "$ fits 2 of oneOf"
    expect(says("1", both)).is "$ fits what it must not"
    expect(says("10", both)).is "$ is above 9"
    expect(says('{"a": 1, "b": 2}', { minProperties = 1, maxProperties = 1 })).is "$ has more than 1 names"
    expect(says("{}", { minProperties = 1 })).is "$ has fewer than 1 names"
    expect(function() fits(1, { ["$ref"] = "#/$defs/none" }) end).fails "$ref should be a place in the schema, such as #/$defs/point, got #/$defs/none"
    expect(function() fits(1, { ["$ref"] = "other.json#/a" }) end).fails "got other.json#/a"
    expect(function() fits(1, { ["$ref"] = "#" }) end).fails "refers to itself without end at $"
  end)
  it("compares numbers", function()
    expect(says("5", { minimum = 5, maximum = 5 })).is "ok"
    expect(says("5", { exclusiveMinimum = 5 })).is "$ is not above 5"
    expect(says("5", { exclusiveMaximum = 5 })).is "$ is not below 5"
    expect(says("4.5", { minimum = 5 })).is "$ is below 5"
    expect(says('"text"', { minimum = 5 })).is "ok"
  end)
  it("translates expressions, and refuses what has no counterpart", function()
    for _, case in ipairs {
      { "^\\d{3}-\\d{4}$", "555-1234", true }, { "^\\d{3}-\\d{4}$", "55-1234", false }, { "^a{2,3}$", "aa", true },
      { "^a{2,3}$", "aaaa", false },
      { "^a{2,}$", "aaaaa", true }, { "^a{2,}$", "a", false }, { "^[^\\d\\]]+$", "ab", true }, { "^[^\\d\\]]+$", "a]", false },
      { "a.c", "xabcx", true },
      { "^\\$1\\.5%$", "$1.5%", true }, { "^[%w]$", "%", true }, { "^[%w]$", "a", false }, { "^\\w+@\\w+\\.org$", "me_2@x.org", true },
    } do
      expect(case[2]:find(schema.pattern(case[1])) ~= nil).is(case[3])
    end
    for _, bad in ipairs { "(a)", "a|b", "a*?", "*a", "\\bx", "[a", "a{3,2}" } do
      expect(function() schema.pattern(bad) end).fails "not supported"
    end
  end)
  it("refuses keywords that it would pass over", function()
    expect(function() schema.validate(1, { prefixItems = {} }) end).fails "the keyword prefixItems is not supported"
    expect(fits(1, { title = "one", description = "a number" })).is(true)
    expect(fits(1, true) and not fits(1, false)).is(true)
  end)
end)
