-- A webhook tells of messages: what was claimed or held was sent.
-- ARGV  ordinals from 4 on, 4 bytes each.
-- Answers 'ok', sequence, then for each 1 for the bit, 0 for nothing, or the matter that stands.
local outside = load(4)
if outside then return {'outside', outside, count} end
local answer, any = {'ok', seq}, false
for i = 4, #ARGV do
  local field = sub(ARGV[i], 1, 4)
  local kind = open[field] and sub(open[field], 1, 1)
  if kind == 'c' or kind == 'h' then
    accept(field)
    any = true
  end
  answer[i - 1] = accepted[field] and 1 or open[field] or 0
end
if any then answer[2] = save() end
return answer
