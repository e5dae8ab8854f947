--- std.tales: what a text of tales is made of, and that a seed fixes it.
local tales, harness = require "std.tales", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect

describe("tales", function()
  local text = tales.write { count = 200, seed = 3 }
  it("are as many as asked for, each ended by an empty line", function()
    local count = select(2, text:gsub("\n\n", ""))
    expect(count).is(200)
    expect(text:sub(-2)).is "\n\n"
    -- A tale is one line: nothing else ends lines.
    expect(select(2, text:gsub("\n", ""))).is(400)
  end)
  it("depend on the seed alone", function()
    math.random(100)
    expect(tales.write { count = 200, seed = 3 } == text).is(true)
    expect(tales.write { count = 200, seed = 4 } == text).is(false)
    expect(tales.write { count = 5 }).is(tales.write { count = 5, seed = 1 })
    -- More tales begin with the fewer.
    expect(text:sub(1, #tales.write { count = 50, seed = 3 })).is(tales.write { count = 50, seed = 3 })
  end)
  it("add up", function()
    local numbers = {}
    for value, name in ipairs { "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen" } do
      numbers[name] = value
    end
    local sums = 0
    for tale in text:gmatch "[^\n]+" do
      local own, more, both = tale:match "had (%l+) .+ brought (%l+) more%. Now they had (%l+) "
      if own then
        expect(numbers[own] + numbers[more]).is(numbers[both])
        sums = sums + 1
      end
    end
    -- About one turn of three is a sum.
    assert(sums > 40 and sums < 95, sums)
  end)
  it("bring a hero and a friend, never the same", function()
    for hero, friend in text:gmatch " (%u%l+) met (%u%l+) the" do assert(hero ~= friend, hero) end
  end)
  it("refuse what cannot be meant", function()
    expect(function() tales.write { count = 0 } end).fails "`count` should be an integer of at least 1, got 0"
    expect(function() tales.write { cuont = 3 } end).fails "`cuont`"
    expect(function() tales.write { count = 1, sed = 3 } end).fails "tales.lua"
  end)
end)
