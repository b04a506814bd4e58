-- ARGV  settlements from 4 on: ordinal 4, generation 4, attempt 2, action 1, 'outcome/reason'.
--       Actions: a accept, r release, d doubt, h hold, x close.
-- Answers 'ok', sequence, now, then for each settlement a number, or the matter that stands.
local DONE, ACCEPTED, NOTHING = 1, 2, 3

local outside = load(4)
if outside then return {'outside', outside, count} end

local function settle(asked)
  local field, action = sub(asked, 1, 4), sub(asked, 11, 11)
  local found = open[field]
  if accepted[field] then return action == 'a' and DONE or ACCEPTED end
  if not found then return action == 'r' and DONE or NOTHING end
  local kind, epoch = sub(found, 1, 1), sub(found, 2, 5)
  if sub(found, 6, 11) ~= sub(asked, 5, 10) then return found end

  if kind == 'c' and epoch == owner then
    local doubt = sub(found, 12, 12) == '\1'
    if action == 'a' then
      accept(field)
    elseif action == 'd' or action == 'r' and doubt then
      disown(field)
    elseif action == 'r' then
      put(field, false)
    elseif action == 'h' then
      hold(field, '\0')
    elseif doubt then
      return hold(field, '\1')
    else
      put(field, 'x' .. sub(found, 2, 11) .. '\0' .. now8 .. sub(asked, 12))
    end
    return DONE
  end

  local again = kind == 'c' and epoch == '\0\0\0\0' and (action == 'r' or action == 'd')
    or kind == 'h' and epoch == owner and action == 'h'
    or kind == 'x' and action == 'x' and sub(found, 21) == sub(asked, 12)
  return again and DONE or found
end

local answer = {'ok', 0, now}
for i = 4, #ARGV do answer[i] = settle(ARGV[i]) end
answer[2] = save()
return answer
