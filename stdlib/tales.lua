--- Small tales made from a seed: a text of the project's own, simple enough that a model of a million parameters tells
--- new ones after a minute, and rich enough that it must learn to carry a name, a place and a count.
---
--- Example: local text = require("std.tales").write { count = 100, seed = 7 }

local tales = {}

local HEROES = {
  { "fox", "Rena" }, { "heron", "Odo" }, { "badger", "Mila" }, { "hare", "Tobin" }, { "owl", "Sefa" }, { "mole", "Brann" },
  { "otter", "Lio" }, { "crow", "Vesna" }, { "hedgehog", "Pim" }, { "goat", "Ansa" }, { "toad", "Gorm" }, { "mouse", "Ilka" },
}
local PLACES = {
  "the old mill", "the frozen lake", "the edge of the wood", "the red hill", "the river bend", "the empty barn",
  "the stone bridge", "the apple garden", "the tower without a door", "the harbour",
}
local THINGS = {
  { "a lantern", "lanterns" }, { "a silver bell", "silver bells" }, { "a pear", "pears" }, { "a smooth stone", "smooth stones" },
  { "a blue feather", "blue feathers" }, { "a brass key", "brass keys" }, { "a loaf of bread", "loaves of bread" },
  { "a walnut", "walnuts" },
}
local TIMES = {
  "One morning", "Late in the evening", "On the first day of spring", "In the middle of winter", "When the moon was full",
  "After a long rain", "On a windy night",
}
local MOODS = { "glad", "tired", "curious", "hungry", "proud", "a little afraid" }
local NUMBERS = { "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen" }

--- One tale of two to four sentences, and an empty line.
---@param pick fun(list: any[]): any chooses one entry
---@return string text
local function tell(pick)
  local hero, friend = pick(HEROES), pick(HEROES)
  while friend == hero do friend = pick(HEROES) end
  local place, thing, mood = pick(PLACES), pick(THINGS), pick(MOODS)
  local lines = { ("%s %s the %s went to %s."):format(pick(TIMES), hero[2], hero[1], place) }
  local turn = pick { "find", "meet", "count" }
  if turn == "find" then
    lines[#lines + 1] = ("There %s found %s and was %s."):format(hero[2], thing[1], mood)
    lines[#lines + 1] = ("%s took it home and hid it from %s the %s."):format(hero[2], friend[2], friend[1])
  elseif turn == "meet" then
    lines[#lines + 1] = ("At %s %s met %s the %s, who was %s."):format(place, hero[2], friend[2], friend[1], mood)
    lines[#lines + 1] = ('"Have you seen %s?" asked %s.'):format(thing[1], friend[2])
    lines[#lines + 1] = pick {
      ('"No," said %s, "but I will look for it with you."'):format(hero[2]),
      ('"Yes," said %s, "it lies under the leaves at %s."'):format(hero[2], pick(PLACES)),
    }
  else
    local own, more = pick { 2, 3, 4, 5, 6, 7 }, pick { 2, 3, 4, 5, 6 }
    lines[#lines + 1] = ("%s had %s %s, and %s brought %s more."):format(hero[2], NUMBERS[own], thing[2], friend[2], NUMBERS[more])
    lines[#lines + 1] = ("Now they had %s %s between them."):format(NUMBERS[own + more], thing[2])
  end
  return table.concat(lines, " ") .. "\n\n"
end

--- Writes tales, one after another, each followed by an empty line.
---
--- Example: tales.write { count = 2000 }
---@param options { count: integer, seed?: integer } seed: default 1; the same seed gives the same text
---@return string text
function tales.write(options)
  options = require("std.options").check("std.tales.write", options, { "count", "seed" })
  if math.type(options.count) ~= "integer" or options.count < 1 then
    error(("std.tales.write: `count` should be an integer of at least 1, got %s"):format(tostring(options.count)), 2)
  end
  -- A generator of its own, SplitMix64: the text must not depend on what else a script draws.
  local state = options.seed or 1
  local function pick(list)
    state = state + 0x9E3779B97F4A7C15
    local z = state
    z = (z ~ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ~ (z >> 27)) * 0x94D049BB133111EB
    z = z ~ (z >> 31)
    return list[(z >> 33) % #list + 1]
  end
  local parts = {}
  for index = 1, options.count do parts[index] = tell(pick) end
  return table.concat(parts)
end

return tales
