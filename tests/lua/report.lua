--- std.report: the page needs nothing else, shows what it was given, and runs nothing that a model wrote.
local report, harness = require "std.report", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect

local EVIL = "<script>alert('x')</script> & \"quoted\" \0 \xff </title></style>"

local function page()
  return {
    title = "Run " .. EVIL,
    note = EVIL,
    stages = {
      { name = "SFT", metrics = { accuracy = 0.52, kl = 0 }, seconds = 61.27 },
      { name = EVIL, metrics = { accuracy = 0.8312345, [EVIL] = 0 / 0 }, note = EVIL },
    },
    curves = {
      { title = EVIL, x = EVIL, y = EVIL, series = { { name = EVIL, values = { 1, 0 / 0, math.huge, 3 } }, { name = "points", points = { { 0, 1 }, { 10, 2 } } } } },
      { title = "log", log = true, series = { { name = "lr", values = { 1, 0.1, 0, 0.001 } } } },
      { title = "none", series = { { name = "empty", values = {} } } },
      { title = "one", series = { { name = "single", values = { 5 } } } },
    },
    samples = { { stage = EVIL, prompt = EVIL, text = EVIL, answer = EVIL, score = 1 }, { prompt = "p", text = "t", answer = 7 } },
  }
end

--- Tags of a text, all of which must be closed in order; fails otherwise.
local function check_nesting(html)
  local open, void = {}, { meta = true, line = true, circle = true }
  for close, name, attributes in html:gmatch "<(/?)([%a][%w]*)([^<>]*)>" do
    if close == "/" then
      local last = table.remove(open)
      if last ~= name then error(("</%s> closes <%s>"):format(name, tostring(last))) end
    elseif not void[name] and attributes:sub(-1) ~= "/" then
      open[#open + 1] = name
    end
  end
  expect(#open).is(0)
end

describe("the page", function()
  local html = report.html(page())
  it("escapes everything that it was given", function()
    expect(html:find("<script", 1, true)).is(nil)
    expect(html:find("alert('", 1, true)).is(nil)
    expect(html:find("\0", 1, true)).is(nil)
    expect(utf8.len(html) ~= nil).is(true)
    assert(select(2, html:gsub("&lt;script&gt;", "")) >= 12)
    expect(report.escape "a&<>\"'\u{e9}\1\n").is "a&amp;&lt;&gt;&quot;&#39;\u{e9}\u{FFFD}\n"
    expect(report.escape "x\xffy\xc3").is "x\u{FFFD}y\u{FFFD}"
    check_nesting(html)
  end)
  it("loads nothing", function()
    for _, mark in ipairs { "http:", "https:", "src=", "href=", "url(", "@import", "<link", "<img", "<iframe" } do expect(html:find(mark, 1, true)).is(nil) end
    expect(html:find("prefers-color-scheme: dark", 1, true) ~= nil).is(true)
  end)
  it("has the table, the plots and the samples", function()
    for _, part in ipairs { '<th scope="col">accuracy</th>', '<th scope="row">SFT</th><td>', "<td>0.52</td>", "<td>0.8312</td>", "<td>61.3</td>", "no values", "<circle", "right answer: 7", "score: 1" } do
      if not html:find(part, 1, true) then error("no " .. part) end
    end
    expect(select(2, html:gsub("<svg", ""))).is(4)
    -- Values that are no numbers are left out, and nothing else becomes one.
    for points in html:gmatch 'points="([^"]*)"' do expect(points:find "[^%d%.,%- ]").is(nil) end
  end)
  it("draws values where they belong", function()
    local one = report.html { title = "t", curves = { { title = "c", series = { { name = "s", values = { 0, 5, 10 } } } } } }
    local x1, y1, x2, y2, x3, y3 = one:match 'points="([%d.]+),([%d.]+) ([%d.]+),([%d.]+) ([%d.]+),([%d.]+)"'
    expect({ x1, x3 }).is { "64.0", "624.0" }
    expect(x2 * 2).near(x1 + x3, 0.2)
    expect(y2 * 2).near(y1 + y3, 0.2)
    assert(tonumber(y1) > tonumber(y3), "more is higher")
    for _, tick in ipairs { ">0<", ">2<", ">10<" } do assert(one:find(tick, 1, true), tick) end
    local log = report.html { title = "t", curves = { { title = "c", log = true, series = { { name = "s", values = { 1, 0.1, 0.001 } } } } } }
    for _, tick in ipairs { ">1<", ">0.1<", ">0.01<", ">0.001<" } do assert(log:find(tick, 1, true), tick) end
    local many = {}
    for index = 1, 5000 do many[index] = index end
    local points = report.html({ title = "t", curves = { { title = "c", series = { { name = "s", values = many } } } } }):match 'points="([^"]*)"'
    assert(select(2, points:gsub(",", "")) <= 600)
  end)
  it("is written to a file", function()
    local path = os.tmpname()
    expect(report.write(path, page())).is(path)
    local file = assert(io.open(path))
    expect(file:read "a" == html).is(true)
    file:close()
    os.remove(path)
    expect(function() report.write("/nowhere/report.html", page()) end).fails "cannot write /nowhere/report.html"
  end)
  it("refuses what it does not know", function()
    expect(function() report.html { title = "x", stage = {} } end).fails "`stage`"
    expect(function() report.html { title = "x", stages = { { nme = "x" } } } end).fails "a stage has name, metrics, seconds, note, got `nme`"
    expect(function() report.html { title = "x", curves = { { title = "c", series = { { values = {}, colour = 1 } } } } } end).fails "`colour`"
    expect(function() report.text {} end).fails "`title` should be a string"
  end)
end)

describe("the table", function()
  it("has a row for each stage", function()
    local text = report.text {
      title = "Results", columns = { "loss", "accuracy" },
      stages = { { name = "pretrain", metrics = { loss = 1.23456 } }, { name = "sft é", metrics = { loss = 1, accuracy = 0.5 }, seconds = 9 } },
    }
    expect(text).is "Results\nstage      loss  accuracy  seconds\npretrain  1.235\nsft é         1       0.5      9.0"
    expect(report.text { title = "x" }).is "x"
  end)
end)
