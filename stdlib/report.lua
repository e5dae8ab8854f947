--- What a run of several stages came to, as one page of HTML that needs nothing else, and as a table for the terminal.
---
---     local page = {
---       title = "Quickstart",
---       stages = { { name = "SFT", metrics = { accuracy = 0.52 }, seconds = 61 }, { name = "GRPO", metrics = { accuracy = 0.83 } } },
---       curves = { { title = "Reward", x = "step", series = { { name = "mean", values = { 0.4, 0.5, 0.7 } } } } },
---       samples = { { stage = "GRPO", prompt = "12 + 7", text = "Answer: 19", answer = 19, score = 1 } },
---     }
---     print(report.text(page))
---     report.write(run.folder .. "/report.html", page)
---
--- Plots are SVG inside the page; its colours follow the reader's light or dark setting. Whatever a model wrote is escaped.

local report = {}

---@class std.Report
---@field title string
---@field note? string a paragraph below the title
---@field stages? { name: string, metrics: table<string, number|string>, seconds?: number, note?: string }[] rows of the table
---@field columns? string[] metrics in their order; default all, sorted
---@field curves? { title: string, x?: string, y?: string, series: { name: string, values?: number[], points?: number[][] }[], log?: boolean }[] values count from 1; log: a logarithmic axis
---@field samples? { stage?: string, prompt: string, text: string, answer?: any, score?: number }[]

local FIELDS = {
  report = { "title", "note", "stages", "columns", "curves", "samples" },
  stage = { "name", "metrics", "seconds", "note" },
  curve = { "title", "x", "y", "series", "log" },
  series = { "name", "values", "points" },
  sample = { "stage", "prompt", "text", "answer", "score" },
}

local function check(what, value)
  if type(value) ~= "table" then error(("std.report: a %s should be a table, got %s"):format(what, type(value)), 4) end
  for key in pairs(value) do
    local found = false
    for _, known in ipairs(FIELDS[what]) do found = found or known == key end
    if not found then
      error(("std.report: a %s has %s, got `%s`"):format(what, table.concat(FIELDS[what], ", "), tostring(key)), 4)
    end
  end
end

local function check_all(page)
  check("report", page)
  if type(page.title) ~= "string" then error(("std.report: `title` should be a string, got %s"):format(type(page.title)), 3) end
  for _, stage in ipairs(page.stages or {}) do check("stage", stage) end
  for _, curve in ipairs(page.curves or {}) do
    check("curve", curve)
    for _, series in ipairs(curve.series) do check("series", series) end
  end
  for _, sample in ipairs(page.samples or {}) do check("sample", sample) end
end

local ENTITIES = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;", ["'"] = "&#39;" }

--- A text as HTML shows it, in an element or in a quoted attribute. Bytes that are not UTF-8, and control characters that HTML does not
--- have, become U+FFFD.
---
--- Example: assert(report.escape "a < b" == "a &lt; b")
---@param text any
---@return string html
function report.escape(text)
  text = tostring(text)
  local pieces, from = {}, 1
  while from <= #text do
    local _, bad = utf8.len(text, from)
    pieces[#pieces + 1] = text:sub(from, (bad or #text + 1) - 1)
    if not bad then break end
    pieces[#pieces + 1], from = "\u{FFFD}", bad + 1
  end
  text = table.concat(pieces):gsub("[%z\1-\8\11\12\14-\31\127]", "\u{FFFD}")
  return (text:gsub("[&<>\"']", ENTITIES))
end

--- A number as a reader wants it: four digits that count, whole numbers whole.
local function show(value)
  if type(value) ~= "number" then return tostring(value) end
  if value ~= value then return "nan" end
  if value == math.huge or value == -math.huge then return value > 0 and "inf" or "-inf" end
  if value % 1 == 0 and math.abs(value) < 1e9 then return ("%d"):format(value) end
  return ("%.4g"):format(value)
end

--- The names of metrics, in the order of columns, that at least one stage has.
local function columns_of(page)
  if page.columns then return page.columns end
  local seen, names = {}, {}
  for _, stage in ipairs(page.stages or {}) do
    for name in pairs(stage.metrics or {}) do
      if not seen[name] then seen[name], names[#names + 1] = true, name end
    end
  end
  table.sort(names)
  return names
end

--- The table of stages as rows of texts, the head first.
local function rows_of(page)
  local names, timed = columns_of(page), false
  for _, stage in ipairs(page.stages or {}) do timed = timed or stage.seconds ~= nil end
  local head = { "stage" }
  for _, name in ipairs(names) do head[#head + 1] = name end
  if timed then head[#head + 1] = "seconds" end
  local rows = { head }
  for _, stage in ipairs(page.stages or {}) do
    local row = { stage.name }
    for _, name in ipairs(names) do
      local value = (stage.metrics or {})[name]
      row[#row + 1] = value == nil and "" or show(value)
    end
    if timed then row[#row + 1] = stage.seconds and ("%.1f"):format(stage.seconds) or "" end
    rows[#rows + 1] = row
  end
  return rows
end

local function width(text) return utf8.len(text) or #text end

--- The table of stages for a terminal: names to the left, numbers to the right.
---
--- Example: print(report.text { title = "Run", stages = { { name = "SFT", metrics = { accuracy = 0.5 } } } })
---@param page std.Report
---@return string text ends without a new line
function report.text(page)
  check_all(page)
  local rows, widths = rows_of(page), {}
  for _, row in ipairs(rows) do
    for column, cell in ipairs(row) do widths[column] = math.max(widths[column] or 0, width(cell)) end
  end
  local lines = { page.title }
  if #rows == 1 then return page.title end
  for _, row in ipairs(rows) do
    local cells = {}
    for column, cell in ipairs(row) do
      local space = (" "):rep(widths[column] - width(cell))
      cells[column] = column == 1 and cell .. space or space .. cell
    end
    lines[#lines + 1] = (table.concat(cells, "  "):gsub("%s+$", ""))
  end
  return table.concat(lines, "\n")
end

-- Width and height of a plot, and the room around its lines for labels.
local PLOT = { width = 640, height = 280, left = 64, right = 16, top = 12, bottom = 40 }
-- More points than pixels are drawn as means of neighbours.
local POINTS_MAX = 600
-- Colours of series, by number, as style names them.
local COLOURS = 6

local function finite(value) return type(value) == "number" and value == value and value ~= math.huge and value ~= -math.huge end

--- The points of a series that can be drawn; on a logarithmic axis these are above 0.
local function points_of(series, log)
  local points = {}
  for index, entry in ipairs(series.points or series.values or {}) do
    local x, y = index, entry
    if series.points then x, y = entry[1], entry[2] end
    if finite(x) and finite(y) and not (log and y <= 0) then points[#points + 1] = { x, log and math.log(y, 10) or y } end
  end
  if #points <= POINTS_MAX then return points end
  local thinned, size = {}, math.ceil(#points / POINTS_MAX)
  for from = 1, #points, size do
    local x, y, count = 0, 0, 0
    for index = from, math.min(from + size - 1, #points) do x, y, count = x + points[index][1], y + points[index][2], count + 1 end
    thinned[#thinned + 1] = { x / count, y / count }
  end
  return thinned
end

--- Round numbers from low to high, about `count` of them; of a logarithmic axis over a decade or more, whole powers of ten.
local function ticks(low, high, count, log)
  local raw = math.max((high - low) / count, log and high - low > 1.2 and 1 or 0)
  local power = 10 ^ math.floor(math.log(raw, 10))
  local step = power
  for _, factor in ipairs { 1, 2, 5, 10 } do
    if raw <= factor * power * 1.0001 then
      step = factor * power
      break
    end
  end
  local list = {}
  for index = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) do list[#list + 1] = index * step end
  return list
end

--- The least and greatest of both coordinates over all series; nil if there is nothing to draw.
local function bounds_of(all)
  local low, high
  for _, points in ipairs(all) do
    for _, point in ipairs(points) do
      low = low or { point[1], point[2] }
      high = high or { point[1], point[2] }
      for axis = 1, 2 do low[axis], high[axis] = math.min(low[axis], point[axis]), math.max(high[axis], point[axis]) end
    end
  end
  if not low then return nil end
  for axis = 1, 2 do
    local room = high[axis] - low[axis]
    if room <= 0 then
      local half = math.max(math.abs(low[axis]) * 0.1, 0.5)
      low[axis], high[axis] = low[axis] - half, high[axis] + half
    elseif axis == 2 then
      low[axis], high[axis] = low[axis] - room * 0.04, high[axis] + room * 0.04
    end
  end
  return low, high
end

--- One plot as SVG.
local function plot(curve)
  local all = {}
  for index, series in ipairs(curve.series) do all[index] = points_of(series, curve.log) end
  local low, high = bounds_of(all)
  local parts = { ('<svg viewBox="0 0 %d %d" role="img" aria-label="%s">'):format(PLOT.width, PLOT.height, report.escape(curve.title)) }
  local function add(format, ...) parts[#parts + 1] = format:format(...) end
  if not low then
    add('<text x="%d" y="%d" text-anchor="middle">no values</text></svg>', PLOT.width // 2, PLOT.height // 2)
    return table.concat(parts)
  end
  local right, bottom = PLOT.width - PLOT.right, PLOT.height - PLOT.bottom
  local function at_x(x) return PLOT.left + (x - low[1]) / (high[1] - low[1]) * (right - PLOT.left) end
  local function at_y(y) return bottom - (y - low[2]) / (high[2] - low[2]) * (bottom - PLOT.top) end
  for _, tick in ipairs(ticks(low[2], high[2], 5, curve.log)) do
    local label = curve.log and show(10 ^ tick) or show(tick)
    add('<line class="grid" x1="%d" x2="%d" y1="%.1f" y2="%.1f"/>', PLOT.left, right, at_y(tick), at_y(tick))
    add('<text x="%d" y="%.1f" text-anchor="end">%s</text>', PLOT.left - 6, at_y(tick) + 4, report.escape(label))
  end
  for _, tick in ipairs(ticks(low[1], high[1], 6)) do
    add('<text x="%.1f" y="%d" text-anchor="middle">%s</text>', at_x(tick), bottom + 16, report.escape(show(tick)))
  end
  add('<line class="axis" x1="%d" x2="%d" y1="%d" y2="%d"/>', PLOT.left, right, bottom, bottom)
  add('<text x="%d" y="%d" text-anchor="middle">%s</text>', (PLOT.left + right) // 2, PLOT.height - 6, report.escape(curve.x or "step"))
  if curve.y then
    local middle = PLOT.height // 2
    add('<text x="12" y="%d" transform="rotate(-90 12 %d)" text-anchor="middle">%s</text>', middle, middle, report.escape(curve.y))
  end
  for index, points in ipairs(all) do
    local colour = (index - 1) % COLOURS + 1
    if #points == 1 then
      add('<circle class="c%d" cx="%.1f" cy="%.1f" r="3"/>', colour, at_x(points[1][1]), at_y(points[1][2]))
    elseif #points > 1 then
      local places = {}
      for number, point in ipairs(points) do places[number] = ("%.1f,%.1f"):format(at_x(point[1]), at_y(point[2])) end
      local name = report.escape(curve.series[index].name)
      add('<polyline class="c%d" points="%s"><title>%s</title></polyline>', colour, table.concat(places, " "), name)
    end
  end
  parts[#parts + 1] = "</svg>"
  return table.concat(parts)
end

--- A plot with its title, and names and last values of its series below.
local function figure(curve)
  local keys = {}
  for index, series in ipairs(curve.series) do
    local points = points_of(series, curve.log)
    local last = points[#points]
    local value = last and show(curve.log and 10 ^ last[2] or last[2]) or "none"
    local colour = (index - 1) % COLOURS + 1
    keys[index] = ('<li><span class="key k%d"></span>%s <b>%s</b></li>'):format(colour, report.escape(series.name), report.escape(value))
  end
  return ("<figure><figcaption>%s</figcaption>%s<ul>%s</ul></figure>"):format(report.escape(curve.title), plot(curve), table.concat(keys))
end

local function stages_table(page)
  local rows, lines = rows_of(page), {}
  for number, row in ipairs(rows) do
    local cells = {}
    for column, cell in ipairs(row) do
      local tag = (number == 1 or column == 1) and "th" or "td"
      local scope = number == 1 and ' scope="col"' or column == 1 and ' scope="row"' or ""
      cells[column] = ("<%s%s>%s</%s>"):format(tag, scope, report.escape(cell), tag)
    end
    lines[number] = "<tr>" .. table.concat(cells) .. "</tr>"
  end
  local notes = {}
  for _, stage in ipairs(page.stages) do
    if stage.note then notes[#notes + 1] = ("<p><b>%s</b>: %s</p>"):format(report.escape(stage.name), report.escape(stage.note)) end
  end
  return '<div class="wide"><table>' .. table.concat(lines, "\n") .. "</table></div>" .. table.concat(notes)
end

local function sample_block(sample)
  local head = {}
  if sample.stage then head[#head + 1] = report.escape(sample.stage) end
  if sample.answer ~= nil then head[#head + 1] = "right answer: " .. report.escape(show(sample.answer)) end
  if sample.score then head[#head + 1] = "score: " .. report.escape(show(sample.score)) end
  return ('<article><p class="head">%s</p><pre class="prompt">%s</pre><pre>%s</pre></article>'):format(
    table.concat(head, " &middot; "), report.escape(sample.prompt), report.escape(sample.text))
end

local STYLE = [[
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --box: #f5f7f9;
  --c1: #2563a8; --c2: #b4541a; --c3: #2e7d4f; --c4: #8a3fa0; --c5: #a3262a; --c6: #5d6b00; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --soft: #9aa5b0; --line: #343a41; --box: #1d2125;
  --c1: #6aa9ee; --c2: #f0985a; --c3: #6cc48f; --c4: #cf8be3; --c5: #f08080; --c6: #c3cf5c; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; } th:first-child { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; } .grid { stroke: var(--line); } .axis { stroke: var(--soft); }
figure ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.key { display: inline-block; width: .9rem; height: .25rem; margin-right: .35rem; vertical-align: middle; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
article { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .8rem 0; }
.head { margin: 0; color: var(--soft); font-size: .85rem; }
pre { background: var(--box); padding: .5rem .7rem; border-radius: 4px; margin: .4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.prompt { background: none; padding-left: 0; color: var(--soft); }
]]

--- The whole page as HTML. Nothing in it is loaded from elsewhere.
---
--- Example: local html = report.html { title = "Run", curves = { { title = "Loss", series = { { name = "train", values = { 3, 2, 1 } } } } } }
---@param page std.Report
---@return string html
function report.html(page)
  check_all(page)
  local title, parts = report.escape(page.title), {}
  local function add(text) parts[#parts + 1] = text end
  add '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
  add '<meta name="viewport" content="width=device-width, initial-scale=1">'
  add(("<title>%s</title>\n<style>\n%s"):format(title, STYLE))
  for colour = 1, COLOURS do
    local rules = "polyline.c# { stroke: var(--c#); } circle.c#, .k# { fill: var(--c#); background: var(--c#); }"
    add((rules:gsub("#", tostring(colour))))
  end
  add(("</style>\n</head>\n<body>\n<h1>%s</h1>"):format(title))
  if page.note then add(("<p>%s</p>"):format(report.escape(page.note))) end
  if page.stages and #page.stages > 0 then add("<h2>Stages</h2>\n" .. stages_table(page)) end
  if page.curves and #page.curves > 0 then
    add '<h2>Curves</h2>\n<div class="plots">'
    for _, curve in ipairs(page.curves) do add(figure(curve)) end
    add "</div>"
  end
  if page.samples and #page.samples > 0 then
    add "<h2>Samples</h2>"
    for _, sample in ipairs(page.samples) do add(sample_block(sample)) end
  end
  add "</body>\n</html>\n"
  return table.concat(parts, "\n")
end

--- Writes the page to a file.
---
--- Example: report.write(run.folder .. "/report.html", { title = "Run" })
---@param path string
---@param page std.Report
---@return string path
function report.write(path, page)
  local html = report.html(page)
  local file, message = io.open(path, "w")
  if not file then error(("std.report.write: cannot write %s"):format(message), 2) end
  local written, why = file:write(html)
  if written then written, why = file:close() end
  if not written then error(("std.report.write: cannot write %s: %s"):format(path, why), 2) end
  return path
end

return report
